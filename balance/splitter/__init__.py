"""Balancing inside one ordinary backward pass."""
