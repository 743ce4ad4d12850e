"""Grids: their YAML files, their cells, and checks of data and weights before a run."""
