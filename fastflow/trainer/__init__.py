"""The program ``fastflow train | evaluate | sample | interpolate``: command line, data, training loop, ranks, pictures."""
