"""Losses to task gradients to a Gramian, and weights to ``.grad``: everything that calls autograd."""
