"""Benchmarks: grids of cells, the runner, tables of what was measured, and their comparison with published numbers."""
