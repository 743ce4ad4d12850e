"""Shared by all tasks: cells from request to record, data, models, command line."""
