"""What all tasks share: requests, records, the pipeline behind every ``run``, and the command line."""
