"""Quantizers: pure functions on tensors, and small modules that hold their scales."""
