"""Kernels that were measured on an H200 before this project; the model is calibrated on them.

They stay as they were measured: a change would part them from their times.
"""
