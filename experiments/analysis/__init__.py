"""Recorded runs to comparisons, tables, figures and reports."""
