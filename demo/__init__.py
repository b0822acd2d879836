"""Demonstrations on drawn images: a detector on scenes of shapes, a classifier on shapes and textures."""
