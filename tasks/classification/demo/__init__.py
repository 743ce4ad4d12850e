"""Demo of classification without downloads: digit pairs and three tiny transformers."""
