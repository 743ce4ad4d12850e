"""Demo of the classification task without any download: digit pairs and three tiny transformers."""
