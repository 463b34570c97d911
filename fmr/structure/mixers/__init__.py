"""Mixers: what brings positions together without a softmax."""
