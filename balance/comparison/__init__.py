"""Recorded runs to comparisons, tables, figures and reports; independent of the problem that was trained."""
