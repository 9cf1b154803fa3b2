"""Ends a training whose loss is infinite or not a number, and says where that began."""

import functools
from pathlib import Path
from typing import NoReturn

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.nonfinite import Trace, random_states, set_random_states, trace_step
from mmvmamba.engine.wrappers import unwrapped
from mmvmamba.registry import HOOKS

REPLAY = "python -m mmvmamba.engine.replay"
MOST_IMAGES = 8


class InvalidLossError(UsageError):
    """Raised when a loss is not finite: the message says where the numbers come from."""


@HOOKS.register_module()
class StopOnInvalidLoss(Hook):
    """Ends a training at a loss that is infinite or not a number, before weights are updated.

    The forward pass is then run again, on the same batch and with the same random numbers, under
    hooks that name the first module whose result is not finite while its input is. The batch, the
    weights, the random states and the config go to `invalid_loss_iter_N.pt` in the work directory
    (`..._rank_R.pt` where there are several processes), which `python -m mmvmamba.engine.replay`
    runs again. All processes end together.

    An overflow of scaled gradients is no error: the loss is looked at before it is scaled.

    Args:
        interval: Every how many iterations to look. Looking waits for the GPU, and for the other
            processes, in the middle of the step, before mmengine's log of the losses does at its
            end. Between looks a non-finite loss can spoil the weights.

    Raises:
        ValueError: If the interval is not a positive integer.
    """

    # After hooks that seed the generators for the step.
    priority = "VERY_LOW"

    def __init__(self, interval: int = 1):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval={interval!r} must be a positive integer.")
        self.interval = interval
        self._batch = self._random = None

    def before_train(self, runner: Runner) -> None:
        """Puts the check in front of every update."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            runner.logger.warning(
                f"losses are not checked: {type(self).__name__} watches one optimizer, and the "
                f"config has {type(wrapper).__name__}."
            )
            return
        update = wrapper.update_params

        @functools.wraps(update)
        def check_and_update(loss: Tensor, *args, **kwargs) -> None:
            # Without a batch the iteration is not to be looked at.
            if self._batch is not None and self._invalid_somewhere(loss):
                self._stop(runner, loss)
            update(loss, *args, **kwargs)

        wrapper.update_params = check_and_update

    def after_train(self, runner: Runner) -> None:
        """Takes the check away."""
        vars(runner.optim_wrapper).pop("update_params", None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Keeps what the step can be repeated with."""
        del batch_idx
        if self.every_n_train_iters(runner, self.interval):
            self._batch, self._random = data_batch, random_states()

    def after_train_iter(self, *_args, **_kwargs) -> None:
        """Lets go of it."""
        self._batch = self._random = None

    @staticmethod
    def _invalid_somewhere(loss: Tensor) -> bool:
        """Whether the loss of any process is not finite."""
        invalid = (~loss.detach().isfinite().all()).float()
        dist.all_reduce(invalid, op="max")
        return bool(invalid)

    def _stop(self, runner: Runner, loss: Tensor) -> NoReturn:
        """Repeats the step, in all processes, and ends the training.

        Raises:
            InvalidLossError: Always.
        """
        set_random_states(self._random)
        # A forward pass may wait for the other processes: those whose loss is finite run it too.
        try:
            trace = trace_step(runner.model, self._batch, runner.optim_wrapper)
        except torch.OutOfMemoryError as error:
            # What the backward pass would need is still there.
            if dist.get_world_size() > 1:
                # The others may wait for this one within the pass: its end ends theirs.
                raise InvalidLossError(
                    f"the loss of iteration {runner.iter + 1} is not finite in some process, and "
                    f"there is not enough memory to look where: {error}"
                ) from error
            trace = Trace({"loss": float(loss)}, received=f"not enough memory to look: {error}")
        weights = unwrapped(runner.model).state_dict()
        report = None
        if not loss.isfinite().all():
            report = self._report(runner, trace, weights)
        reports = dist.all_gather_object(report)
        if len(reports) > 1:
            reports = [one and f"in process {rank}:\n{one}" for rank, one in enumerate(reports)]
        self.after_train(runner)
        last = runner.message_hub.runtime_info.get("last_ckpt")
        raise InvalidLossError(
            f"the loss of iteration {runner.iter + 1} is not finite; training ends before it "
            f"changes a weight. The last checkpoint: {last or 'none yet'}.\n"
            + "\n".join(filter(None, reports))
        )

    def _report(self, runner: Runner, trace: Trace, weights: dict[str, Tensor]) -> str:
        images = image_names(self._batch)
        lines = [str(trace)]
        if images:
            more = f", and {len(images) - MOST_IMAGES} more" if len(images) > MOST_IMAGES else ""
            lines.append(f"  images: {', '.join(images[:MOST_IMAGES])}{more}")
        lines.append(f"  what may help: {advice(trace)}")
        rank = f"_rank_{dist.get_rank()}" if dist.get_world_size() > 1 else ""
        # Not .pth, by which checkpoints are looked for.
        path = Path(runner.work_dir) / f"invalid_loss_iter_{runner.iter + 1}{rank}.pt"
        content = {
            "iteration": runner.iter + 1,
            "losses": trace.losses,
            "report": str(trace),
            "images": images,
            "batch": self._batch,
            "random_states": self._random,
            "state_dict": weights,
            "config": runner.cfg.to_dict(),
        }
        try:
            torch.save(content, path)
        # torch says so where a disk is full.
        except (OSError, RuntimeError) as error:
            lines.append(f"  {path} could not be written: {error}")
        else:
            lines.append(f"  batch, weights, random states and config: {path}")
            lines.append(f"  to run the step again: {REPLAY} {path}")
        return "\n".join(lines)


def image_names(batch: object) -> list[str]:
    """The files that a batch's images come from, as far as its samples say."""
    samples = batch.get("data_samples") if isinstance(batch, dict) else None
    names = [sample.get("img_path") for sample in samples or () if hasattr(sample, "get")]
    return [str(name) for name in names if name]


def advice(trace: Trace) -> str:
    """What a user may do about a loss that is not finite."""
    if trace.batch:
        return "look at the annotations and the pipeline of these images."
    if any(torch.float16 in origin.dtypes for origin in trace.origins[:1]):
        return (
            "float16 ends at 65504, bfloat16 where float32 does: "
            "--cfg-options optim_wrapper.dtype=bfloat16"
        )
    return (
        "a lower learning rate, a longer warm-up, or clipping the gradients: "
        "--cfg-options optim_wrapper.clip_grad.max_norm=1"
    )
