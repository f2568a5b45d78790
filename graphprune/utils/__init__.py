"""What has nothing to do with pruning: files, inputs, tensors by name, torch's switches, pages."""
