"""Batches of data, and running a model on them."""
