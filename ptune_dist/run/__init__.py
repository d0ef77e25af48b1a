"""A run: its folder, status, checkpoints, progress, stopping, logging and summary."""
