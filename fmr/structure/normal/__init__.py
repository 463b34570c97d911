"""The words that matchers are made of: products as einsum, index maps, walks."""
