"""Opening a tracked block, its values by ID, its files, the second witness."""
