"""What the user keeps: the published adapter, its card, and the report."""
