"""Benchmarks: grids of cells, their runs, tables, and comparison with published numbers."""
