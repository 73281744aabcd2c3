"""What a compiled program costs: chips, FLOPs, memory and collectives of HLO, and the roofline bound."""
