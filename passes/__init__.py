"""Passes: each rewrites a graph into a smaller or faster one that computes what it promises."""
