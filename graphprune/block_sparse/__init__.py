"""Products with matrices of which only some blocks are not zero."""
