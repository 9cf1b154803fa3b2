#!/usr/bin/env python
"""Evaluates a detector, a segmentor or a classifier. See `--help`."""

import sys

try:
    from mmvmamba.engine.cli import test_main
except ImportError as error:
    if type(error).__name__ == "StackError":
        sys.exit(f"error: {error}")
    if error.name != "mmvmamba":
        raise
    sys.exit(
        f"error: mmvmamba is not installed for {sys.executable}.\n"
        "  In a checkout: `bash tools/quickstart.sh` sets everything up in .venv, and\n"
        "  `pip install -e .` adds mmvmamba to an environment that has OpenMMLab's packages."
    )

if __name__ == "__main__":
    test_main()
