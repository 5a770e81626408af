"""Processes that train one model together: collectives, and the wrappers that reduce gradients."""
