"""Training and testing: what `tools/train.py`, `tools/test.py` and the launch scripts run."""
