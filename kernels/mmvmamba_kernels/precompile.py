"""``python -m mmvmamba_kernels.precompile ARCH``: compile a backbone's Triton kernels in parallel.

They go to Triton's cache on the disk, where training and inference find them. A GPU is not needed
if ``--target`` names one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from types import ModuleType

logger = logging.getLogger(__name__)


def shape(text: str) -> tuple[int, int, int]:
    """Reads BATCHxHEIGHTxWIDTH."""
    numbers = tuple(int(part) for part in text.split("x"))
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _backbones() -> tuple[ModuleType, type]:
    """What knows which kernels a backbone calls, and the backbone.

    They stand on this package, not below it.
    """
    try:
        precompile, vmamba = (
            importlib.import_module(f"mmvmamba.models.{name}") for name in ("precompile", "vmamba")
        )
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"precompile needs mmvmamba, which knows the kernels of each architecture, and "
            f"mmvmamba cannot be imported: {error}"
        ) from error
    return precompile, vmamba.VMamba


def _arguments(argv: Sequence[str] | None, modes: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mmvmamba_kernels.precompile", description=__doc__
    )
    parser.add_argument("arch", metavar="ARCH", help="such as tiny, or tiny-s1l8")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=modes,
        default=["autocast-bf16"],
        help="of weights, or what autocast casts to (default: autocast-bf16)",
    )
    parser.add_argument(
        "--passes", nargs="+", choices=("inference", "training"), default=["inference", "training"]
    )
    parser.add_argument("--target", help="such as sm_90 (default: the GPU of this machine)")
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=shape,
        default=[],
        metavar="BxHxW",
        help="further inputs; only those with less than 224 pixels in a side have other kernels",
    )
    parser.add_argument(
        "--jobs", type=int, help="processes (default: one for each core, 16 at most)"
    )
    parser.add_argument("--list", action="store_true", help="name the kernels, compile nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status: 0, or 1 if a kernel cannot be compiled.
    """
    backbones, backbone = _backbones()
    options = _arguments(argv, list(backbones.MODES))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        compiler = importlib.import_module("mmvmamba_kernels.backends.triton.precompile")
    except ModuleNotFoundError as error:
        logger.error("Triton is needed, and cannot be imported: %s", error)  # noqa: TRY400
        return 1
    try:
        target = compiler.Target.parse(options.target) if options.target else compiler.Target.here()
        modes = [
            backbones.Mode(*backbones.MODES[name], training=passes == "training")
            for name in options.dtype
            for passes in options.passes
        ]
        shapes = (*backbones.SHAPES, *options.sizes)
        build = functools.partial(backbone.of_one_block_a_stage, options.arch)
        kernels = backbones.kernels_of(build, modes, target, shapes)
    except ValueError as error:
        logger.error("%s", error)  # noqa: TRY400
        return 1
    todo = compiler.missing(kernels)
    logger.info(
        "%s on %s: %d kernels, %d to compile", options.arch, target.name, len(kernels), len(todo)
    )
    if options.list:
        for kernel in kernels:
            logger.info("%s %s", kernel.name, kernel.digest[:10])
        return 0
    start = time.perf_counter()

    def tell(name: str, seconds: float, left: int) -> None:
        logger.info("%s (%.1f s), %d left", name, seconds, left)

    try:
        done = compiler.compile_kernels(kernels, target, options.jobs, tell)
    except compiler.PrecompileError as error:
        logger.error("%s", error)  # noqa: TRY400
        return 1
    logger.info("compiled %d kernels in %.0f s", done, time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
