"""Surgery: cut closed channels, absorb open gates, verify the result."""
