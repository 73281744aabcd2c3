"""What a compiled step costs: FLOPs, bytes, traffic, and the time that a chip would need for them."""
