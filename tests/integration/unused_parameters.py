"""Backbones of which not every parameter is trained, in two processes against one."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, distributed, nn

from mmvmamba.models import VMamba

ARCH = {"dims": 8, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
STEPS = 3
PROCESSES = 2


class Loss(nn.Module):
    """A backbone and the loss of the maps from a first one on."""

    def __init__(self, first: int = 0, **arguments):
        super().__init__()
        self.backbone, self.first = VMamba(ARCH, **arguments), first

    def forward(self, image: Tensor) -> Tensor:
        # Not squares alone, which are constant after a normalisation.
        outs = self.backbone(image)[self.first :]
        return sum((out.square() * out.sigmoid()).mean() for out in outs)


def train(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for image in images:
        optimizer.zero_grad()
        model(image).backward()
        optimizer.step()


def largest_difference(rank: int, find_unused: bool = False, **arguments) -> float:
    """Between the parameters that two processes find, and those that one finds by itself."""
    torch.manual_seed(0)
    model = Loss(**arguments)
    alone = copy.deepcopy(model)
    images = torch.randn(STEPS, PROCESSES, 1, 3, 64, 64)
    # As `StrictRunner.wrap_model` does.
    wrapped = MMDistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=find_unused
    )
    train(wrapped, images[:, rank])
    train(alone, images.flatten(1, 2))
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


CASES: dict[str, dict] = {
    "all": {},
    "first maps alone": {"out_indices": (0, 1)},
    "frozen stages": {"frozen_stages": 2},
    "recomputed": {"with_cp": True},
    "first maps alone, frozen, recomputed": {
        "out_indices": (1, 2),
        "frozen_stages": 1,
        "with_cp": True,
    },
    "a map that no loss uses, as the config says": {"first": 1, "find_unused": True},
}


def run(rank: int, folder: str) -> None:
    """What each process does: writes the difference, or the error's text, by the case's name."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES
    )
    results = {name: largest_difference(rank, **case) for name, case in CASES.items()}
    try:
        largest_difference(rank, first=1)
    except RuntimeError as error:
        results["a map that no loss uses"] = str(error)
    distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    start = torch.multiprocessing.start_processes
    start(run, (sys.argv[1],), nprocs=PROCESSES, start_method="fork")
