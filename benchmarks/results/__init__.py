"""Results of cells: scores, outcomes of single samples, and the committed reference."""
