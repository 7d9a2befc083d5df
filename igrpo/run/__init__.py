"""A run's folder: its lock, records, checkpoints, and what is shown meanwhile."""
