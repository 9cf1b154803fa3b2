"""What whole models share as they are deployed: normalisation, padding, and parts that export."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvmamba.engine.errors import UsageError


class Deployable(nn.Module):
    """A model from pixels to results.

    Its images are (B, C, H, W), float32, from 0 to 255, of channels in the order that `channels`
    says. It normalises and pads them itself.

    Args:
        model: A model of mmpretrain, mmdet or mmseg, which stays as it is.

    Attributes:
        outputs: Names of the results, in their order.
        batched: Whether a call takes several images.
        channels: 'RGB', or 'as loaded' where the model takes what its pipeline loads.
    """

    outputs: tuple[str, ...]
    batched = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = with_exportable_parts(model).eval().requires_grad_(False)
        given = model.data_preprocessor
        converts = ("to_rgb", "_channel_conversion", "channel_conversion")
        # OpenMMLab turns three channels round, and leaves others as they are.
        swaps = model.backbone.in_channels == 3
        swaps = swaps and any(getattr(given, name, False) for name in converts)
        self.channels = "RGB" if swaps else "as loaded"
        self.normalises = given._enable_normalize
        if self.normalises:
            self.register_buffer("mean", given.mean[None].clone())
            self.register_buffer("std", given.std[None].clone())
        settings = getattr(given, "test_cfg", None) or {}
        if settings.get("size"):
            raise UsageError(
                "data_preprocessor.test_cfg.size pads images to one size, which is not exported: "
                "use size_divisor, or leave it out."
            )
        self.divisor = settings.get("size_divisor") or getattr(given, "pad_size_divisor", 1)
        self.pad_value = float(getattr(given, "pad_value", getattr(given, "pad_val", 0)))

    def normalised(self, images: Tensor) -> Tensor:
        """What the network takes, (B, C, H', W')."""
        if self.normalises:
            images = (images - self.mean) / self.std
        if self.divisor > 1:
            height, width = (
                (side + self.divisor - 1) // self.divisor * self.divisor
                for side in images.shape[2:]
            )
            padding = (0, width - images.shape[3], 0, height - images.shape[2])
            images = F.pad(images, padding, value=self.pad_value)
        return images


def require(module: nn.Module, kind: type, method: str, what: str) -> None:
    """Refuses a module whose method is not the one that its deployable form stands for.

    Raises:
        UsageError: If it is none of a class, or has its own method.
    """
    if not isinstance(module, kind) or getattr(type(module), method) is not getattr(kind, method):
        raise UsageError(f"{type(module).__name__} cannot be exported; exported are {what}.")


class _AdaptiveAveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two products, for maps of any size.

    Exporters know adaptive pooling of fixed sizes alone.
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows = self._means(x.shape[2], self.size[0], x)
        columns = self._means(x.shape[3], self.size[1], x)
        return rows @ x @ columns.t()

    @staticmethod
    def _means(length: int, count: int, like: Tensor) -> Tensor:
        """A matrix (count, length) whose rows average over the bins."""
        bins = torch.arange(count, device=like.device)[:, None]
        begin, end = bins * length // count, ((bins + 1) * length + count - 1) // count
        places = torch.arange(length, device=like.device)
        inside = (places >= begin) & (places < end)
        return inside.to(like.dtype) / (end - begin).to(like.dtype)


class _Doubling(nn.Module):
    """mmseg's `Upsample` by a whole factor, without floating-point sizes."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None):
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.factor for side in x.shape[2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size = module.output_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return None if size == (1, 1) or None in size else _AdaptiveAveragePool(size)
    factor = getattr(module, "scale_factor", None)
    if type(module).__module__ == "mmseg.models.utils.wrappers" and factor == int(factor or 0):
        return _Doubling(int(factor), module.mode, module.align_corners)
    return None


def with_exportable_parts(model: nn.Module) -> nn.Module:
    """A copy of a model in which layers that exporters do not know have an equal in their place."""
    model = deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            stand_in: Callable | None = _replacement(child)
            if stand_in is not None:
                setattr(parent, name, stand_in)
    return model
