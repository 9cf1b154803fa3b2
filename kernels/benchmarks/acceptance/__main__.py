"""The acceptance run for a machine with a GPU: correct, repeatable, fast enough?

Checks every operator's values against float64, that repeats and CUDA graphs give the same bits, and
how many kernels are compiled. Times the scan's core, and VMamba-T beside Swin-T, ConvNeXt-T and
DeiT-S of timm, every mode in this one run. Needs PyTorch and Triton, timm for the peers, and none
of OpenMMLab's packages. Prints a verdict for every target and writes all figures to a JSON file.

    python kernels/benchmarks/acceptance
    python kernels/benchmarks/acceptance --from work_dirs/acceptance.json \\
        --markdown docs/performance.md

Exit status: 0 all targets met; 1 some not, or left out; 2 wrong arguments; 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
NO_GPU = 3


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--backend", default="triton", help="of the operators (default: triton)")
    parser.add_argument(
        "--seconds", type=float, default=270, help="after which nothing new starts (default: 270)"
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/acceptance.json"))
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of this command")
    parser.add_argument("--from", dest="source", type=Path, help="read this run, measure nothing")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables into this file (needs mmvmamba installed)"
    )
    parser.add_argument("--section", default="gpu", help="of that file (default: gpu)")
    return parser.parse_args(argv)


def about(device, backbone: str) -> dict[str, str]:
    """What the figures depend on."""
    import torch

    name = f"{platform.machine()} CPU"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    found = {"command": shlex.join(["python", "kernels/benchmarks/acceptance", *sys.argv[1:]])}
    found |= {"date": str(date.today()), "commit": _commit(), "device": name}
    for package in ("torch", "triton", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found | {"backbone": backbone}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=_FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def measure(options: argparse.Namespace) -> dict:
    """Runs all parts, as long as there is time."""
    import torch

    from acceptance import bare, operators, timing
    from acceptance.run import Run, on

    backbone = bare.import_backbone()
    device = torch.device(options.device)
    backend = None if options.backend == "auto" else options.backend
    run = Run(device, backend, options.tiny, time.perf_counter() + options.seconds)
    run.data["about"] = about(device, backbone)
    parts = {
        "compiling": timing.check_compiling,
        "prepare": operators.compile_cases,
        "values": operators.check_values,
        "tf32": operators.check_tf32,
        "repeats": operators.check_repeats,
        "graphs": operators.check_graphs,
        "refusal": operators.check_refusal,
        "core": timing.time_core,
        "states": timing.time_states,
        "backbones": timing.time_backbones,
        "models": timing.time_models,
    }
    if device.type != "cuda":
        for name in ("prepare", "graphs", "refusal"):
            del parts[name]
    unknown = set(options.only or ()) - set(parts)
    if unknown:
        names = ", ".join(sorted(unknown))
        sys.exit(f"--only: no part {names} on {device}; there are {', '.join(parts)}")
    with on(device):
        for name, part in parts.items():
            if not options.only or name in options.only:
                run.section(name, part)
    record = run.record()
    record["status"] = run.status
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse_arguments(argv)
    # Started as a folder, where Python looks for modules in the folder itself.
    for path in (_FOLDER.parents[1], _FOLDER.parent):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    from acceptance.report import markdown, summary
    from acceptance.run import tell

    if options.source:
        record = json.loads(options.source.read_text())
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            tell("no GPU: PyTorch sees no CUDA device here, so there is nothing to accept")
            return NO_GPU
        with tempfile.TemporaryDirectory() as cache:
            # Afresh, so that what compiling takes is measured.
            os.environ["TRITON_CACHE_DIR"] = cache
            record = measure(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        seconds = sum(record["seconds"].values())
        tell(f"{summary(record)}; {seconds:.0f} s; written to {options.out}")
    if options.markdown:
        from mmvmamba.analysis.reports import write_section

        write_section(options.markdown, options.section, markdown(record))
    return record["status"]


if __name__ == "__main__":
    # The folder itself has modules whose names others have too.
    sys.path = [path for path in sys.path if Path(path).resolve() != _FOLDER]
    sys.exit(main())
