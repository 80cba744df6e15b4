"""What every training run shares: atomic checkpoints, signals, resuming, its report."""
