"""Analysis: which channels live and die together."""
