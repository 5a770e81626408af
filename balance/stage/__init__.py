"""One training step: losses in, ``.grad`` out."""
