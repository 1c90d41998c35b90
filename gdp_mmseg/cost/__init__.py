"""Cost of a network as a function of the openness of its gates."""
