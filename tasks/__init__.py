"""Evaluation tasks: each subpackage provides its data, models and metrics."""
