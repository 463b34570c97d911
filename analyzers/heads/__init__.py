"""What attention heads look at, and which of them do the same."""
