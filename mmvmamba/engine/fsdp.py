"""Fully sharded data parallelism: every process keeps a part of the weights and of their states.

For mmengine's `FlexibleRunner`, in a config:

    runner_type = "FlexibleRunner"
    strategy = dict(type="mmvmamba.BlockwiseFSDPStrategy")
"""

from collections.abc import Callable
from pathlib import Path

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process
from mmengine.optim import BaseOptimWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mmvmamba.engine.checkpoint_hook import UNFINISHED
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.resume import check_resumable
from mmvmamba.engine.runner import load_strictly, model_weights
from mmvmamba.engine.schedules import fit_warm_up
from mmvmamba.models.checkpoint import read_checkpoint
from mmvmamba.models.layers import VSSBlock
from mmvmamba.registry import STRATEGIES


@STRATEGIES.register_module()
class BlockwiseFSDPStrategy(FSDPStrategy):
    """mmengine's FSDP strategy, which shards VMamba block by block.

    A process gathers the weights of one VSS block at a time; all else (stem, downsampling, heads)
    is gathered together. Beyond mmengine's strategy it runs on the CPU (gloo) too, clips gradients
    by the norm over all processes instead of each process's own shards', resumes (mmengine's calls
    PyTorch 2.0's interface) and loads strictly. Checkpoints hold the whole model, as those of any
    other training: `tools/test.py` reads them.

    Args:
        model_wrapper: Arguments of `MMFullyShardedDataParallel`; `auto_wrap_policy` is by default
            one VSS block after the other.
        state_dict_cfg: As mmengine's, but 'full' by default, and nothing else: sharded
            checkpoints (a folder of one file per process) could be read by nothing else here.
        **kwargs: As mmengine's.

    Raises:
        UsageError: If `state_dict_cfg` is not 'full'.
    """

    def __init__(
        self, *, model_wrapper: dict | None = None, state_dict_cfg: str = "full", **kwargs
    ):
        if state_dict_cfg != "full":
            raise UsageError(
                f"strategy.state_dict_cfg={state_dict_cfg!r}: this strategy writes whole "
                "checkpoints, state_dict_cfg='full'. Leave the setting out."
            )
        wrapper = {"type": "MMFullyShardedDataParallel", **(model_wrapper or {})}
        wrapper.setdefault("auto_wrap_policy", ModuleWrapPolicy({VSSBlock}))
        if get_device() == "cpu":
            wrapper["device_id"] = torch.device("cpu")
        super().__init__(model_wrapper=wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if get_device() == "cpu":
            # Moving what is there already would free it while it is still read.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Builds the model, whose weights are then ordered as their shapes say."""
        model = super().build_model(model)
        for parameter in model.parameters():
            # PyTorch 2.11 flattens a channels-last weight in the order of its memory, and the
            # optimizer state that it loads for it in the order of its shape.
            parameter.data = parameter.data.contiguous()
        return model

    def build_optim_wrapper(
        self, optim_wrapper: dict | BaseOptimWrapper, model: nn.Module | None = None
    ) -> BaseOptimWrapper:
        """Builds the optimizer; its gradients are clipped by their norm over all processes."""
        built = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(built, "clip_func", None) is nn.utils.clip_grad_norm_:
            built.clip_func = _clip_over_processes(model)
        return built

    def _build_param_scheduler(self, scheduler, optim_wrapper, default_args: dict) -> list:
        """Builds the schedulers, whose warm-up fits the training as in any other runner."""
        fitted, lines = fit_warm_up(
            scheduler, default_args["max_iters"], default_args["epoch_length"]
        )
        for line in lines:
            self.logger.warning(line)
        return super()._build_param_scheduler(fitted, optim_wrapper, default_args)

    def save_checkpoint(self, filename: str, **kwargs) -> None:
        """Saves the whole model in one file, which appears under its name when it is whole."""
        unfinished = Path(f"{filename}{UNFINISHED}")
        super().save_checkpoint(str(unfinished), **kwargs)
        if is_main_process():
            unfinished.replace(filename)
        barrier()

    def load_checkpoint(
        self, filename: str, *, callback: Callable[[dict], None] | None = None, **kwargs
    ) -> dict:
        """Loads a checkpoint into the shards, strictly.

        Args:
            filename: A path, or a URL.
            callback: Called with the content, which it may change.
            **kwargs: Not used: files are read on the CPU, and loading is always strict.

        Returns:
            The file's content without the weights.

        Raises:
            CheckpointError: If the file cannot be read or does not fit the model.
        """
        del kwargs
        checkpoint = read_checkpoint(filename)
        checkpoint["state_dict"] = model_weights(checkpoint, filename)
        if callback is not None:
            callback(checkpoint)
        loaded = load_strictly(_Whole(self.model), checkpoint.pop("state_dict"), filename)
        self.logger.info(f"{loaded} tensors loaded from {filename}")
        return checkpoint

    def resume(
        self, filename: str, *, callback: Callable[[dict], None] | None = None, **kwargs
    ) -> dict:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: If the file cannot be read, does not fit, or holds weights alone.
        """

        def check(checkpoint: dict) -> None:
            check_resumable(checkpoint, filename)
            if callback is not None:
                callback(checkpoint)

        return super().resume(filename, callback=check, **kwargs)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Hands every process its part of the optimizer's state."""
        optimizer = self.optim_wrapper.optimizer
        shards = FullyShardedDataParallel.optim_state_dict_to_load(
            self.model, optimizer, state_dict
        )
        self.optim_wrapper.load_state_dict(shards)


class _Whole(nn.Module):
    """A sharded model as a whole, for what reads and writes its state dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # Not as a submodule, which would stand in the keys.
        self._model = (model,)

    def _gathered(self):
        return FullyShardedDataParallel.state_dict_type(
            self._model[0], StateDictType.FULL_STATE_DICT, FullStateDictConfig()
        )

    def state_dict(self) -> dict[str, Tensor]:
        with self._gathered():
            return self._model[0].state_dict()

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        with self._gathered():
            self._model[0].load_state_dict(state, strict=strict)


def _clip_over_processes(model: FullyShardedDataParallel) -> Callable:
    def clip(parameters: list[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`clip_grad_norm_` of a sharded model, whose parameters here are parts of the whole."""
        del parameters
        return model.clip_grad_norm_(max_norm, norm_type)

    return clip
