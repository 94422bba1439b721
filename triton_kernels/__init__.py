"""Triton kernels and their launchers, one file per family of ops; installed as ``fastflow.triton_kernels``.

They have a folder of their own because they import triton, which is optional. An op imports its file
before its first launch.
"""
