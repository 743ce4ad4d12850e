"""Demo data and demo models: real handwritten digits, and small models trained on them."""
