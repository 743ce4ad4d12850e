"""Training of the demo models, one module per task."""
