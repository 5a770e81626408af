"""The stage between losses and optimizer: one training step, losses in, ``.grad`` out."""
