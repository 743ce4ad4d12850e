"""What cells measured: scores, outcomes of single samples, and the committed reference."""
