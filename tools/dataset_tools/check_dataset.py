#!/usr/bin/env python
"""Looks at a config's data without training. See `--help`."""

from mmvmamba.analysis.data_report import main

if __name__ == "__main__":
    main()
