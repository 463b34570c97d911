"""Residual streams: what is written to them, and the layers that write."""
