"""Layouts of official data sets on disk, which generators write and problems read."""
