"""Street images: 7 classes and inverse depth from one network."""
