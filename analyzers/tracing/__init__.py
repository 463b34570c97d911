"""Where a fact is recalled: its subject made unreadable, and single states put back."""
