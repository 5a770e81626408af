"""Measurements of conflict and scale, taken before a method is chosen."""
