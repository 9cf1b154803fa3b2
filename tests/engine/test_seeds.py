"""Samples and steps draw random numbers that depend on their place in a training alone."""

import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop as Upstream
from mmengine.runner import loops as upstream_loops
from tiny import TASKS, command_line
from torch.utils.data import Dataset

from mmvmamba.engine import cli
from mmvmamba.engine.loops import IterBasedTrainLoop
from mmvmamba.engine.seeds import build_train_dataloader, seed_step

SIZE, BATCH = 12, 2


class Noisy(Dataset):
    """A data set whose samples are their indices and what the three generators gave."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple:
        assert type(index) is int
        drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
        return index, *drawn

    def get_data_info(self, index: int) -> dict:
        return {"width": 2 + index % 3, "height": 3}


def passes(number=1, rank=0, world_size=1, monkeypatch=None, **options) -> list[list]:
    """The batches of a data loader's passes, in the process of a rank."""
    if monkeypatch:
        for module in ("mmengine.dataset.sampler", "mmvmamba.engine.seeds"):
            monkeypatch.setattr(f"{module}.get_dist_info", lambda: (rank, world_size))
    start, by_epoch = options.pop("start", 0), options.pop("by_epoch", True)
    seed = options.pop("seed", 5)
    config = {
        "dataset": Noisy(),
        "batch_size": BATCH // world_size,
        "num_workers": 0,
        "sampler": {"type": DefaultSampler, "shuffle": True},
        "collate_fn": {"type": "pseudo_collate"},
        **options,
    }
    loader = build_train_dataloader(config, seed, start, by_epoch)
    result = []
    for epoch in range(number):
        loader.batch_sampler.sampler.set_epoch(epoch)
        # mmengine's collation gives one list per part of the samples.
        batches = islice(loader, 2 * SIZE // BATCH)
        result.append([tuple(zip(*batch, strict=True)) for batch in batches])
    return result


def test_epochs_differ_and_runs_do_not():
    first, second = passes(2)
    assert sorted(index for batch in first for index, *_ in batch) == list(range(SIZE))
    assert first != second
    assert passes(2) == [first, second]
    assert passes(2, seed=6) != [first, second]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_samples(workers):
    persistent = {"num_workers": workers, "persistent_workers": True}
    assert passes(2, **persistent) == passes(2)


@pytest.mark.parametrize("sampler", [DefaultSampler, InfiniteSampler])
def test_two_processes_share_the_samples_of_one(monkeypatch, sampler):
    kind = {"sampler": {"type": sampler, "shuffle": True}}
    (whole,) = passes(**kind)
    shares = [passes(rank=r, world_size=2, monkeypatch=monkeypatch, **kind)[0] for r in (0, 1)]
    together = [sorted(one + other) for one, other in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in whole]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"batch_sampler": {"type": AspectRatioBatchSampler}},
        {"drop_last": True, "batch_size": 5},
        {"sampler": {"type": InfiniteSampler, "shuffle": True}, "by_epoch": False},
    ],
    ids=["plain", "workers", "aspect ratios", "drop last", "infinite"],
)
def test_a_later_start_leaves_out_what_was_seen(options):
    whole, following = passes(2, **options)
    rest, following_too = passes(2, start=2, **options)
    if options.get("by_epoch", True):
        assert rest == whole[2:]
        assert following_too == following
    else:
        # What never ends is looked at in passes of one length.
        assert rest[:-2] == whole[2:]


def test_iterations_over_a_finite_sampler_start_in_their_epoch():
    first, second = passes(2)
    (rest,) = passes(1, start=len(first) + 2, by_epoch=False)
    assert rest == second[2:]


def test_a_training_by_iterations_is_resumed_within_its_epoch(project, sample_data, tmp_path):
    arguments = command_line(TASKS["mmseg"], project, sample_data, tmp_path)
    arguments += ["train_dataloader.sampler.type=DefaultSampler"]

    def batches(iteration: int, epoch: int) -> list[list[int]]:
        runner = cli.build_runner(cli.train_config(cli.parse_train_arguments(arguments)))
        runner._resumed = {"meta": {"iter": iteration}}
        sampler = runner.train_loop.dataloader.batch_sampler
        sampler.sampler.set_epoch(epoch)
        return [list(map(int, batch)) for batch in sampler]

    # Four images are two steps.
    assert batches(3, 0) == batches(0, 1)[1:]


class Dicing(InfiniteSampler):
    """Draws from NumPy's global generator, as mmdet's samplers of several sources do."""

    def __iter__(self):
        while True:
            yield int(np.random.randint(SIZE))  # noqa: NPY002


def test_a_sampler_that_draws_from_the_global_generator_has_numbers_of_its_own():
    options = {"sampler": {"type": Dicing}, "by_epoch": False}
    (whole,) = passes(**options)
    np.random.seed(1)  # noqa: NPY002
    (rest,) = passes(**options, start=3)
    assert rest[:-3] == whole[3:]


def test_the_loader_knows_its_batch_size():
    """mmpretrain's PreciseBNHook, and mmengine's scaling of the learning rate, ask for it."""
    config = {"dataset": Noisy(), "sampler": {"type": DefaultSampler}, "num_workers": 0}
    assert build_train_dataloader({**config, "batch_size": 3}, 5).batch_size == 3
    assert build_train_dataloader(config, 5).batch_size == 1


def test_steps_of_all_places_differ():
    drawn = set()
    for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        for _ in range(2):
            seed_step(*place)
            drawn.add((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert len(drawn) == 4


class AdvancedByItself(upstream_loops._InfiniteDataloaderIterator):
    """OneDL's iterator, which its loop asks to leave steps out."""

    def skip_iter(self, steps: int) -> None:
        for _ in range(steps):
            next(self)


def run_of_onedl(loop: Upstream) -> None:
    loop.dataloader_iterator.skip_iter(loop._iter)
    # Upstream's own leaves nothing out at iteration 0.
    loop._max_iters -= loop._iter
    loop._iter = 0
    run_upstream(loop)


run_upstream = Upstream.run


@pytest.mark.parametrize("onedl", [False, True])
def test_the_loop_does_not_leave_out_what_the_loader_has_left_out(monkeypatch, onedl):
    if onedl:
        monkeypatch.setattr(upstream_loops, "_InfiniteDataloaderIterator", AdvancedByItself)
        monkeypatch.setattr(Upstream, "run", run_of_onedl)
    config = {
        "dataset": Noisy(),
        "batch_size": BATCH,
        "num_workers": 0,
        "sampler": {"type": InfiniteSampler, "seed": 3},
        "collate_fn": {"type": "pseudo_collate"},
    }

    def trained_on(start: int) -> list:
        seen = []
        model = SimpleNamespace(
            train=lambda: None,
            train_step=lambda data, optim_wrapper: seen.append(data) or {},
        )
        runner = SimpleNamespace(
            seed=5, model=model, optim_wrapper=None, val_loop=None, call_hook=lambda *_, **__: None
        )
        loader = build_train_dataloader(config, 5, start, by_epoch=False)
        loop = IterBasedTrainLoop(runner, loader, max_iters=8)
        loop._iter = start
        loop.run()
        return seen

    whole = trained_on(0)
    assert len(whole) == 8
    assert trained_on(3) == whole[3:]
