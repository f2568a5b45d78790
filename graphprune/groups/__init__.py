"""The dependency graph: which channels go together, why others stay, and what a channel costs."""
