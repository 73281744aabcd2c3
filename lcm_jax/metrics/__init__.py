"""Measures of generated images: feature networks, distances between feature sets, and tables of them."""
