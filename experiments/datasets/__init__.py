"""Data sets that are generated here, layouts of official data sets on disk, and a cache of decoded images."""
