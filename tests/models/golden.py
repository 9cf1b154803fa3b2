"""Reads the golden data: small models computed with the official implementation."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parent.parent / "data"
CASES = sorted(path.stem for path in (DATA / "golden").glob("*.npz"))
FORWARD_TYPES = sorted(path.stem for path in (DATA / "forward_types").glob("*.npz"))
VARIANTS = json.loads((DATA / "variants.json").read_text())


@dataclass
class Golden:
    """One case: official arguments, weights, input, outputs and, in some cases, gradients."""

    kwargs: dict
    weights: dict[str, Tensor]
    input: Tensor
    outs: list[Tensor]
    logits: Tensor
    grad_outs: list[Tensor]
    grad_input: Tensor | None
    grads: dict[str, Tensor]

    @property
    def backbone_kwargs(self) -> dict:
        """The official arguments with `out_indices` for all stages."""
        return self.kwargs | {"out_indices": tuple(range(len(self.outs)))}

    @property
    def backbone_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.weights.items() if not k.startswith("classifier.")}


@functools.cache
def read(case: str, folder: str = "golden") -> dict[str, np.ndarray]:
    """The arrays of a case; whoever changes them copies them."""
    with np.load(DATA / folder / f"{case}.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    # Small cases have all weights in one array, and all gradients, with names in `meta`.
    names = json.loads(str(arrays["meta"]))
    for prefix, name in (("w:", "weights"), ("g:", "gradients")):
        begin = 0
        for key, shape in names.get(name, {}).items():
            end = begin + math.prod(shape)
            arrays[prefix + key] = arrays[name][begin:end].reshape(shape)
            begin = end
    return arrays


def has_gradients(case: str) -> bool:
    """Whether a case has gradients, without reading them."""
    with np.load(DATA / "golden" / f"{case}.npz") as archive:
        return any(name == "gradients" or name.startswith("g:") for name in archive.files)


def load(case: str, folder: str = "golden") -> Golden:
    arrays = read(case, folder)

    def tensor(array):
        tensor = torch.from_numpy(array.copy())
        return tensor.float() if tensor.is_floating_point() else tensor

    def numbered(prefix):
        count = sum(name.startswith(prefix) for name in arrays)
        return [tensor(arrays[f"{prefix}{i}"]) for i in range(count)]

    def named(prefix):
        return {
            k.removeprefix(prefix): tensor(v) for k, v in arrays.items() if k.startswith(prefix)
        }

    return Golden(
        kwargs=json.loads(str(arrays["meta"]))["kwargs"],
        weights=named("w:"),
        input=tensor(arrays["input"]),
        outs=numbered("out"),
        logits=tensor(arrays["logits"]),
        grad_outs=numbered("gout"),
        grad_input=tensor(arrays["ginput"]) if "ginput" in arrays else None,
        grads=named("g:"),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest deviation over the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
