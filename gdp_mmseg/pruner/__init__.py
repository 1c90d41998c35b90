"""Pruner: gates, cost and schedule, held to a budget."""
