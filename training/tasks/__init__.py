"""What models are trained for: losses, training data and validation of each task."""
