"""The demonstration: a trained network, a sample of its data, and the main job on both."""
