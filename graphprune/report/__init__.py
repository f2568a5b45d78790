"""What a slimming came to: two models side by side, and a page about it."""
