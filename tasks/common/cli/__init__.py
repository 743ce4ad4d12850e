"""The command line that all tasks share."""
