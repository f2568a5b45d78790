"""Smaller copies of models: tensors sliced, and every number that says a size made true."""
