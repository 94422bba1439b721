"""Triton kernels and their launchers, one file a kernel family; installed as ``fastflow.triton_kernels``.

A folder of its own beside ``fastflow/`` because kernels import triton, which not every machine has: nothing here is
imported before an op is about to run one of them.
"""
