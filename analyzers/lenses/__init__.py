"""What the residual stream says on its way: read out at each layer, taken apart by who wrote it, and translated."""
