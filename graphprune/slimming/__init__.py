"""`slim` and what it consists of: the stages in order, the forms of the result, steps, latency."""
