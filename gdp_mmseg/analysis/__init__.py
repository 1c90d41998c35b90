"""Analysis of a model: which channels have to be pruned together."""
