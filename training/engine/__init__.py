"""What every run shares: set-up, the loop, checkpoints, results, and how a run ends."""
