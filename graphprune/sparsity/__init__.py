"""Sparse connections between filters and gradual sparsity of recurrent layers."""
