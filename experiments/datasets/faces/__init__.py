"""Drawn faces with the attributes and the file layout of CelebA."""
