"""What an answer rests on: numbers for tokens, pixels or any value of a model, and how far these can be believed."""
