"""One cell: its identity, its stages, its record, and the lease that only one process holds."""
