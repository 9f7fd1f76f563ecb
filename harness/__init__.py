"""What is held constant across experiments: command line, run folder, device, checkpoints; training, datasets, evaluation, reporting."""
