"""From a model and example inputs to a graph in one dialect: everything that traces."""
