"""The 1D selective scan with groups."""
