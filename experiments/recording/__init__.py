"""Recorded runs: what of a run goes to MLflow, and how it is read back."""
