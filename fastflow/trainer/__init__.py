"""The program ``fastflow train | evaluate | sample | interpolate``."""
