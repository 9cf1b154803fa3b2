"""``python -m mmvmamba_kernels.stand_in train.py --its --options`` runs a script with stand-ins.

A process that multiprocessing starts anew ("spawn") does not have them; one that it forks does.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from mmvmamba_kernels.stand_in import install


def main() -> None:
    """Run the program that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m mmvmamba_kernels.stand_in",
        description="Runs a program with stand-ins for the modules that VMamba-family code imports",
    )
    parser.add_argument(
        "--replace", action="store_true", help="also in the place of modules that are installed"
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="the program is a module's name"
    )
    parser.add_argument("program", help="the script, a path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="all that follows is its own")
    options = parser.parse_args()
    if options.replace:
        install(replace=True)
    sys.argv = [options.program, *options.arguments]
    if options.module:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    elif os.path.exists(options.program):
        if not getattr(sys.flags, "safe_path", False):
            # As Python itself: a script finds the modules beside it.
            sys.path[0] = os.path.dirname(os.path.abspath(options.program))
        runpy.run_path(options.program, run_name="__main__")
    else:
        parser.error(f"there is no script {options.program!r}; a module's name needs -m before it")


if __name__ == "__main__":
    main()
