"""Image-caption retrieval and zero-shot classification task."""
