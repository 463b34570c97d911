"""The names of torch's functions, and fused kernels in plain ops."""
