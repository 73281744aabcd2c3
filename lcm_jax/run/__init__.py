"""From a config to the objects of a run: the only room, beside the programs, that reads a config."""
