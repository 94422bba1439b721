"""Whole models, built from :mod:`fastflow.nn`."""

from fastflow.models.glow import Glow

__all__ = ["Glow"]
