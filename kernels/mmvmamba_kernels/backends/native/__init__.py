"""The compiled libraries, for CPUs and for NVIDIA GPUs: their sources, building, loading."""
