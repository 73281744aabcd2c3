"""Measures of sampled pictures: distances between feature sets and a reader of shapes pictures."""
