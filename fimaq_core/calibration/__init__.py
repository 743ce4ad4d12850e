"""Ranges: where scales and zero points come from before any reconstruction."""
