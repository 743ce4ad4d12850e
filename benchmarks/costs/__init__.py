"""Costs of cells: seconds, memory and disk, measured or estimated."""
