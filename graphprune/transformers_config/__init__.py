"""Configs of transformers that say the sizes of slim models."""
