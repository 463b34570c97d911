"""Each finding recomputed and compared."""
