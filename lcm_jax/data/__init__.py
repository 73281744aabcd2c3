"""Data sets: pictures and captions, as NumPy arrays."""
