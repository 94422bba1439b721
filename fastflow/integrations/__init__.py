"""Faster layers for flows of other libraries: one module each, with ``accelerate`` and ``revert``."""
