"""How weights are updated: mixed precision on any device, and layer-wise learning rates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper as UpstreamAmpOptimWrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from mmvmamba.engine.tasks import type_name
from mmvmamba.models import MM_VSSM, VMamba
from mmvmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(UpstreamAmpOptimWrapper):
    """mmengine's mixed precision, which also runs where there is no accelerator.

    On an accelerator it is mmengine's. On the CPU, which mmengine's refuses, it computes in
    bfloat16 by default, or in float16, for which most CPUs have no fast instructions.

    Args:
        loss_scale: 'dynamic', a number that stays, or a dict of `torch.amp.GradScaler`'s arguments.
        dtype: 'float16', 'bfloat16' or the like, or a torch.dtype; the device's own choice if None.
        use_fsdp: Whether the parameters are sharded.
        **kwargs: `OptimWrapper`'s: `optimizer`, `accumulative_counts`, `clip_grad`.

    Raises:
        ValueError: If the loss scale or the dtype is none of these; on an accelerator it is
            mmengine's TypeError or AssertionError.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs,
    ):
        if get_device() != "cpu":
            super().__init__(loss_scale, dtype, use_fsdp, **kwargs)
            return
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = loss_scale if isinstance(loss_scale, float) else None
        if loss_scale == "dynamic":
            options = {}
        elif isinstance(loss_scale, float):
            options = {"init_scale": loss_scale}
        elif isinstance(loss_scale, dict):
            options = loss_scale
        else:
            raise ValueError(
                f"loss_scale={loss_scale!r} must be 'dynamic', a float or a dict of GradScaler's "
                "arguments."
            )
        self.loss_scaler = (ShardedGradScaler if use_fsdp else torch.amp.GradScaler)(
            device="cpu", **options
        )
        if isinstance(dtype, str) and dtype in self.valid_dtypes:
            dtype = getattr(torch, dtype)
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(self.valid_dtypes)}.")
        self.cast_dtype = dtype

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a forward pass: its precision, and whether gradients are exchanged."""
        if get_device() != "cpu":
            with super().optim_context(model):
                yield
            return
        with OptimWrapper.optim_context(self, model), torch.autocast("cpu", dtype=self.cast_dtype):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with learning rates that fall towards the image.

    A parameter's rate is multiplied by `layer_decay_rate` to the power of its distance from the
    model's head in blocks of the backbone, which the backbone's `get_layer_depth` tells. All else
    in `paramwise_cfg` (`custom_keys`, `norm_decay_mult`, ...) works as mmengine documents it.
    (mmpretrain's constructor asks the model for depths, which detectors and segmentors do not
    know; mmdet's and mmseg's know the names of ConvNeXt's parameters and of few others.)

    Args:
        optim_wrapper_cfg: As mmengine's.
        paramwise_cfg: As mmengine's, and `layer_decay_rate`, in (0, 1].

    Raises:
        ValueError: If `layer_decay_rate` is missing or outside (0, 1], or the optimizer has no
            learning rate.
        TypeError: If the model's backbone does not tell depths.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                f"paramwise_cfg needs layer_decay_rate, a number in (0, 1]; it has {rate!r}."
            )
        if self.base_lr is None:
            raise ValueError("layer-wise decay needs the optimizer's lr in the config.")

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Adds a module's parameters to the groups; the whole model's rates are then decayed."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        backbone = getattr(module, "backbone", None)
        if not hasattr(backbone, "get_layer_depth"):
            raise TypeError(
                f"layer-wise decay needs a backbone with get_layer_depth, such as mmvmamba.VMamba; "
                f"{type(module).__name__} has {type(backbone).__name__}."
            )
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            depth, depths = backbone.get_layer_depth(names[parameter], "backbone.")
            scale = self.paramwise_cfg["layer_decay_rate"] ** (depths - 1 - depth)
            group["lr"] = group.get("lr", self.base_lr) * scale


# Of SGD, the largest that is not told of. Upstream's recipes for ResNets have 0.01 and more.
LARGEST_SGD_RATE = 1e-3


def rate_notice(cfg: Config) -> str | None:
    """What is to be told of a config that trains a VMamba by SGD at a ResNet's rate, if it does."""
    backbone = (cfg.get("model") or {}).get("backbone") or {}
    wrapper = cfg.get("optim_wrapper") or {}
    optimizer = wrapper.get("optimizer") or {}
    if type_name(backbone) not in (VMamba.__name__, MM_VSSM.__name__):
        return None
    if type_name(optimizer) != "SGD":
        return None
    if backbone.get("frozen_stages", -1) >= 4:
        # Linear tuning.
        return None
    custom = (wrapper.get("paramwise_cfg") or {}).get("custom_keys") or {}
    scale = (custom.get("backbone") or {}).get("lr_mult", 1)
    rate = optimizer.get("lr", 0) * scale
    if rate <= LARGEST_SGD_RATE:
        return None
    return (
        f"the optimizer is SGD with lr={rate:g}, a recipe for ResNets, at which a VMamba learns "
        "little or diverges. VMamba's is: optim_wrapper=dict(type='OptimWrapper', optimizer=dict("
        "_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)), for 16 "
        "images a step"
    )
