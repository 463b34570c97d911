"""Watching a model run: module calls, tensor ops, what is overwritten, a few values by ID."""
