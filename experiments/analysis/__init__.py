"""Comparisons that know the problems: published tables, baselines that ship, fronts, and selection on a command line."""
