"""Shared by all tasks: requests, records, the pipeline behind every ``run``, and the command line."""
