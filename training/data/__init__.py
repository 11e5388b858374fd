"""Data sets, and what is done to their rows before a model sees them."""
