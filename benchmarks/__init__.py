"""Measurements, each a module that is run from the checkout: ``python -m benchmarks.NAME``."""
