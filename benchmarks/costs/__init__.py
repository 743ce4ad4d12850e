"""Costs of cells: seconds, memory and disk, measured or estimated, and the plan of a run."""
