"""Random numbers that depend on the place in a training, and on nothing that happened before it.

Every sample's pipeline and every step's forward pass begin with generators seeded from the run's
seed and their own position. A training that is resumed therefore goes on as if it had never
stopped, without generator states in its checkpoints, whatever its data loaders' workers had already
prepared. And because a sample's position is counted over all processes, the same samples are made
in the same way by any number of them.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mmvmamba.engine.data_checks import build_dataloader

# What a position belongs to, so that no step shares its numbers with a sample.
_SAMPLE, _STEP = range(2)


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seeds the generators for one training step of one process: Python's, NumPy's and torch's.

    Args:
        seed: The run's seed.
        iteration: The step's number, counted from 0 over the whole training.
        rank: The process. Each draws its own numbers, for drop path among others.
    """
    _seed_generators(_STEP, seed, iteration, rank)


def _seed_generators(*position: int) -> None:
    # Hashed, so that neighbours have nothing in common.
    python, numpy, pytorch = np.random.SeedSequence(position).generate_state(3)
    random.seed(int(python))
    # What pipelines draw from is NumPy's global generator.
    np.random.seed(int(numpy))  # noqa: NPY002
    torch.manual_seed(int(pytorch))


class _Draw(int):
    """An index of a data set that knows from which position of the training it was drawn."""

    position: tuple[int, ...]


def _draw_items(dataset: Dataset, draws: list[_Draw]) -> list:
    """Makes the samples of one batch; PyTorch's fetchers call a data set's `__getitems__`."""
    items = []
    for draw in draws:
        _seed_generators(*draw.position)
        items.append(dataset[int(draw)])
    return items


class _PositionSampler(Sampler):
    """A sampler whose indices know their position."""

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed = sampler, seed
        self.first_epoch = 0
        self._drawn = 0

    def __iter__(self) -> Iterator[_Draw]:
        # mmengine's samplers deal the indices out to the processes in turn. Those with epochs begin
        # anew with each, the others go on.
        rank, world_size = get_dist_info()
        epoch = getattr(self.sampler, "epoch", None)
        if epoch is not None:
            self._drawn = 0
        for index in _with_numbers_of_its_own(self.sampler, self.seed):
            draw = _Draw(index)
            draw.position = (_SAMPLE, self.seed, epoch or 0, rank + world_size * self._drawn)
            self._drawn += 1
            yield draw

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def dataset(self) -> Dataset:
        """The data set, which batch samplers that look at the images' shapes ask for."""
        return self.sampler.dataset

    def set_epoch(self, epoch: int) -> None:
        """Tells the sampler its epoch, by which it shuffles."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.first_epoch + epoch)


def _with_numbers_of_its_own(sampler: Sampler, seed: int) -> Iterator[int]:
    """Iterates over a sampler that may draw from NumPy's global generator.

    mmdet's for several sources does. Its numbers must not depend on the steps in between.
    """
    indices = iter(sampler)
    own = np.random.RandomState(seed % 2**32).get_state()
    while True:
        others = np.random.get_state()  # noqa: NPY002
        np.random.set_state(own)  # noqa: NPY002
        try:
            index = next(indices)
        except StopIteration:
            return
        finally:
            own = np.random.get_state()  # noqa: NPY002
            np.random.set_state(others)  # noqa: NPY002
        yield index


class PositionBatchSampler(Sampler):
    """Batches of indices that know their position; the first pass may begin at a later batch.

    Args:
        sampler: The sampler.
        batch_size: Samples of a batch.
        seed: The run's seed.
        start: How many batches are left out because a training that is resumed has seen them: of
            the epoch, or of the whole training where the loop does not count epochs. They cost
            nothing but the drawing of their indices.
        by_epoch: Whether the loop counts epochs and tells the sampler.
        batch_sampler: The configured batch sampler; plain batches if None.
        drop_last: Whether plain batches leave out a last one that is not full.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        start: int = 0,
        by_epoch: bool = True,
        batch_sampler: dict | None = None,
        drop_last: bool = False,
    ):
        self.sampler = _PositionSampler(sampler, seed)
        self.batch_size = batch_size
        if batch_sampler is None:
            self.batches = BatchSampler(self.sampler, batch_size, drop_last)
        else:
            parts = {"sampler": self.sampler, "batch_size": batch_size}
            self.batches = DATA_SAMPLERS.build(batch_sampler, default_args=parts)
        if not by_epoch and hasattr(sampler, "epoch") and len(self.batches):
            self.sampler.first_epoch, start = divmod(start, len(self.batches))
            self.sampler.set_epoch(0)
        self.start = start

    def __iter__(self) -> Iterator[list[_Draw]]:
        start, self.start = self.start, 0
        yield from islice(self.batches, start, None)

    def __len__(self) -> int:
        return len(self.batches)


def build_train_dataloader(
    config: dict, seed: int, start: int = 0, by_epoch: bool = True
) -> DataLoader:
    """Builds a training's data loader, whose samples depend on nothing but their position.

    Args:
        config: As mmengine's `Runner.build_dataloader` takes it.
        seed: The run's seed, the same in all processes.
        start: See `PositionBatchSampler`.
        by_epoch: See `PositionBatchSampler`.
    """
    kind = config["sampler"].get("type") if isinstance(config.get("sampler"), dict) else None
    if getattr(kind, "__name__", str(kind)).endswith("TrackImgSampler"):
        # Its indices are pairs of a video and a frame, and mmdet's batch samplers want no other.
        return build_dataloader(config, seed, training=True)
    config = dict(config)
    config.setdefault("batch_size", 1)
    config["batch_sampler"] = {
        "type": PositionBatchSampler,
        "seed": seed,
        "start": start,
        "by_epoch": by_epoch,
        "batch_sampler": config.pop("batch_sampler", None),
        "drop_last": config.pop("drop_last", False),
    }
    loader = build_dataloader(config, seed, training=True)
    loader.dataset.__getitems__ = partial(_draw_items, loader.dataset)
    # PyTorch forgets it where there is a batch sampler; hooks and mmengine's scaling of the
    # learning rate ask for it.
    vars(loader)["batch_size"] = config["batch_size"]
    return loader


def is_resumable(loader: DataLoader) -> bool:
    """Whether a training's data loader begins where the training was interrupted."""
    return isinstance(loader.batch_sampler, PositionBatchSampler)
