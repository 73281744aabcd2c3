"""Data sets of images and captions, as NumPy arrays."""
