"""Indoor images: 13 classes, depth and surface normals from one network."""
