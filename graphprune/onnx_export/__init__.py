"""ONNX files: written with free dimensions, compared with PyTorch, and run where ONNX Runtime can."""
