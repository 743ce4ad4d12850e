"""Example predictions: read from beside records, set side by side, drawn over their pictures."""
