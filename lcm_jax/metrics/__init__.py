"""Measures of sampled pictures: feature networks, distances between feature sets, and a reader of shapes pictures."""
