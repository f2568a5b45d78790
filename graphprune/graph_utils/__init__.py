"""What analyses and passes share about graphs: linear layers, constants, edits, runs by layer."""
