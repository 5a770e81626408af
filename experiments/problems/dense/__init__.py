"""Dense prediction, which nyuv2 and cityscapes share: data, networks, masked losses and metrics."""
