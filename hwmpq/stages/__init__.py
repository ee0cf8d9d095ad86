"""The steps of the main job, one file each; `hwmpq.pipeline` puts them in order.

A step takes the Job and values of earlier steps, and gives a value. What costs time is kept in the
store under a written key, item by item, so that an interrupted run goes on where it was.
"""
