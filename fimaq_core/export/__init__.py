"""Export of quantized models to ONNX files that compute with integers (extra ``[export]``)."""
