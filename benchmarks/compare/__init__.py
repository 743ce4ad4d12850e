"""Comparisons: two runs on the same samples, and measured with published numbers."""
