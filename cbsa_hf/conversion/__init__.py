"""Convert checkpoints of other libraries to CBSA models."""
