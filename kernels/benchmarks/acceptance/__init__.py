"""The acceptance run of a machine with a GPU."""
