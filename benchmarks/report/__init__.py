"""Report of a profile's results: one HTML file that opens from disk without a network."""
