"""Calibration, the simulator and its judge: what a number format does to a network (torch only)."""
