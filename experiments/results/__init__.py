"""Recorded runs -> comparison -> table, figures, report."""
