"""What is held constant across experiments, from the command line to the report."""
