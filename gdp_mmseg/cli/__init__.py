"""Command lines: training, test, export, groups of channels, model check."""
