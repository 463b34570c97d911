"""Dictionaries: sparse autoencoders of the values at a site, what their latents are, and how directions share a space."""
