"""Networks whose features the metrics measure, with the readers of their published weight files."""
