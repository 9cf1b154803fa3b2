"""mmengine's training loops, which go on after an interruption exactly where they were."""

from collections.abc import Iterator

from mmengine.dist import get_rank
from mmengine.runner import EpochBasedTrainLoop as EpochBased
from mmengine.runner import IterBasedTrainLoop as IterBased

from mmvmamba.engine.agreement import naming_single_values
from mmvmamba.engine.seeds import is_resumable, seed_step
from mmvmamba.registry import LOOPS


@LOOPS.register_module()
class EpochBasedTrainLoop(EpochBased):
    """mmengine's loop over epochs, whose steps draw random numbers of their own.

    Attributes:
        epoch_iter: The steps of the current epoch that are done. A training that was saved within
            an epoch is resumed with the ones that are left; its data loader begins there.
    """

    epoch_iter = 0

    def run_epoch(self) -> None:
        """Runs an epoch, or what is left of it."""
        self._done_before = self.epoch_iter if is_resumable(self.dataloader) else 0
        super().run_epoch()
        self.epoch_iter = 0

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """Runs one step."""
        idx += self._done_before
        seed_step(self.runner.seed, self._iter, get_rank())
        self.epoch_iter = idx + 1
        with naming_single_values():
            super().run_iter(idx, data_batch)


@LOOPS.register_module()
class IterBasedTrainLoop(IterBased):
    """mmengine's loop over iterations, whose steps draw random numbers of their own.

    Resuming costs no time: mmengine's loop makes all samples anew that were trained with before,
    this one's data loader begins behind them.
    """

    def run(self) -> None:
        """Runs the training, or what is left of it."""
        if is_resumable(self.dataloader):
            if hasattr(self.dataloader_iterator, "skip_iter"):
                # OneDL's mmengine leaves advancing to its iterator.
                self.dataloader_iterator.skip_iter = lambda _: None
            else:
                batches = self.dataloader_iterator
                self.dataloader_iterator = _without_advancing(batches, self._iter)
        super().run()

    def run_iter(self, data_batch: dict) -> None:
        """Runs one step."""
        seed_step(self.runner.seed, self._iter, get_rank())
        with naming_single_values():
            super().run_iter(data_batch)


def _without_advancing(batches: Iterator, steps: int) -> Iterator:
    """An iterator that can be advanced by a number of steps without leaving its place."""
    for _ in range(steps):
        yield None
    yield from batches
