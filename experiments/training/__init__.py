"""One training run, from the configuration to the final metrics."""
