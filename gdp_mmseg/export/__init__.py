"""Export: from a gated checkpoint to a pruned config and checkpoint."""
