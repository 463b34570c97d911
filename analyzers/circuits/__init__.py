"""Which edges of a model's graph carry an answer: scored, chosen, and tested with all others patched."""
