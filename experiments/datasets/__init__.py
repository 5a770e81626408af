"""Data sets that are generated here, and a cache of decoded images."""
