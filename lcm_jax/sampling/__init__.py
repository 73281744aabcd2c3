"""Images from a model: the one library behind `sample`, `evaluate`, `export --verify` and the grids of training."""
