"""Attention: what lies around each softmax, read by dataflow."""
