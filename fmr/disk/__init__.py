"""Bytes on disk: whole or not at all, and nothing executed on loading."""
