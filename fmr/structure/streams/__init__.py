"""Residual streams: the sums that write to them, and the values that they take."""
