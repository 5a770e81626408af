"""Losses to task gradients to a Gramian, and weights to ``.grad``: all calls of autograd."""
