"""Dense prediction, which nyuv2 and cityscapes share: data, networks, masked losses and metrics.

segnet.py        SegNet, whose last map all tasks share, and the layers of both networks
mtan.py          MTAN: SegNet, and an attention over its maps for each task
model.py         the networks by name, with one head per task
masks.py         the pixels that count, in the papers' codes and here
losses.py        means over the pixels that count
metrics.py       metrics over a whole data set, and as the papers average them
files.py         the official layouts on disk
augmentation.py  scaled crops and flips
splits.py        training, validation and test data
"""
