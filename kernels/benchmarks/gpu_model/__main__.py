"""Predict GPU times of the project's Triton kernels without a GPU; README.md says how far.

predict     milliseconds of the scan core's kernels at the six shapes
profile     where one warp of one kernel waits
count       launches, registers and instructions
calibrate   the model against times that were measured
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

COMMANDS = ("predict", "profile", "count", "calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gpu_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", help="where compiled kernels go; by default a folder of the cache")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see COMMAND --help")
    args = parser.parse_args()
    if args.out:
        os.environ["GPU_MODEL_OUT"] = args.out
    # Started as a folder, where Python looks for modules in the folder itself.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Only now: the folder for compiled kernels is read on import.
    importlib.import_module(f"gpu_model.{args.command}").main(args.arguments)


if __name__ == "__main__":
    main()
