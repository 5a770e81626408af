"""Sweeps: grids of runs, planned and executed in parallel."""
