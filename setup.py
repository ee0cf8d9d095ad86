"""Adds the two top-level data folders to the wheel, as `hwmpq._targets` and `hwmpq._cost_models`.

Everything else stands in pyproject.toml; a list there could not be joined with discovery.
"""

from setuptools import find_packages, setup

DATA = {"hwmpq._targets": "targets", "hwmpq._cost_models": "cost_models"}

setup(packages=[*find_packages(include=["hwmpq*"]), *DATA], package_dir=DATA)
