"""What models take in ONNX Runtime: seconds, memory, and which form of a layer is fastest."""
