"""Image-caption retrieval and zero-shot classification with open_clip."""
