"""Products with matrices of which only some blocks are not zero, as operators of torch and of ONNX."""
