"""Models of published size with random weights, quantized from end to end."""
