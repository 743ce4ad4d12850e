"""Image classification task."""
