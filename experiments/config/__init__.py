"""Typed configuration of a run."""
