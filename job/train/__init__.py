"""One resumable run: what happens inside the trainer process."""
