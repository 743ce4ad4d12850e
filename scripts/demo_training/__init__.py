"""Training of the demo models, a module a task."""
