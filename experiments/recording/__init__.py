"""Recorded runs: which of a run's data goes to MLflow, and the fingerprint of its configuration."""
