"""Results of a grid whose processes are killed, against the same grid undisturbed."""
