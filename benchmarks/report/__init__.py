"""The report: one HTML file of what a profile measured, which opens from disk without a network."""
