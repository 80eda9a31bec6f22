"""What must outlive the machine: the store, checkpoints in it, and the record of every start."""
