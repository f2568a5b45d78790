"""Batches of data, to choose by and to repair on, each process with its share."""
