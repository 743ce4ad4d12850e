"""Image-caption retrieval and zero-shot classification with CLIP-like models."""
