"""A training run: its steps and checkpoints, its arithmetic, and what lasts from batch to batch."""
