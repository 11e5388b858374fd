"""How trained models are scored."""
