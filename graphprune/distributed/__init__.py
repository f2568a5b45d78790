"""Several processes at one model, and models as torch.distributed wraps them."""
