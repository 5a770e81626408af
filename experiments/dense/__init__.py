"""What the experiments on images with an answer for every pixel share."""
