"""Networks as weighted graphs of their units: neurons, channels, residual channels, and communities among them."""
