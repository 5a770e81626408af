"""Environments with several goals, side by side; nothing here imports torch, so that their processes start fast."""
