"""Self-contained result pages, model cards and small images."""
