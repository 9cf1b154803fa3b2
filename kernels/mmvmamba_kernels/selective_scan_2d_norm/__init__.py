"""The fused 2D selective scan with the layer normalisation of its output."""
