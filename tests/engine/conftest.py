"""What the tests of trainings share with the integration tests."""

import sys
from pathlib import Path

# For tiny.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
