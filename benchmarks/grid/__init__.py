"""Grids: their YAML files, their cells, and what cells need before they can run."""
