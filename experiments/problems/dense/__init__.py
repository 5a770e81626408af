"""What the experiments with one answer per pixel share: data, networks, masked losses and metrics.

segnet.py   SegNet, whose last map all tasks share; and what both networks are built of
mtan.py     MTAN: SegNet, and an attention of each task's own over its maps
model.py    the networks by name, with one head per task
masks.py    which pixels count, in the papers' codes and here
losses.py   means over the pixels that count
metrics.py  the same over a whole data set, and as the papers average them
files.py    the official layouts on disk
augmentation.py  scaled crops and flips
splits.py   what of the data is for training, validation and test
"""
