"""The report: one HTML file that shows what a profile measured, opens from disk and asks nothing of any network."""
