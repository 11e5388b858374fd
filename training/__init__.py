"""Training and scoring: five scripts, and the modules that they share."""
