"""The fused 2D selective scan."""
