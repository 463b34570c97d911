"""What causes what: values of one run put into another, and what the answer does."""
