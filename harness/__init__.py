"""What is held constant across experiments: command line, data, devices, run folder, checkpoints, evaluation, figures."""
