"""Device code in Triton and its launches."""
