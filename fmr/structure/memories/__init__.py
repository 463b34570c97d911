"""Memories: feed-forward layers as keys and values."""
