"""Plain PyTorch: the specification of the others, on any device."""
