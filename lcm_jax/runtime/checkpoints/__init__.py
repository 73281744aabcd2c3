"""What a run keeps of its state, verified byte by byte before it is read."""
