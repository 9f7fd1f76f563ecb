"""Results as figures and tables, beside the papers' numbers."""
