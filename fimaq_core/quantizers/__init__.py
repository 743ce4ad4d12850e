"""Quantizers: pure functions on tensors, and the small modules that hold their scales."""
