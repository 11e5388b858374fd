"""What every run shares: the loop, its state on disk, its end."""
