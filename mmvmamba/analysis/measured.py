"""What is measured: a named module from images to tensors, and what all of them are asked.

Nothing of OpenMMLab is imported: the GPU's acceptance run measures with this where it is missing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

NUM_CLASSES = 1000

# Short names of the models that VMamba is compared with: the library, and its name for them, which
# is a config's where it is not timm.
PEERS = {
    "swin-tiny": ("timm", "swin_tiny_patch4_window7_224"),
    "swin-small": ("timm", "swin_small_patch4_window7_224"),
    "swin-base": ("timm", "swin_base_patch4_window7_224"),
    "convnext-tiny": ("timm", "convnext_tiny"),
    "convnext-small": ("timm", "convnext_small"),
    "convnext-base": ("timm", "convnext_base"),
    "deit-tiny": ("timm", "deit_tiny_patch16_224"),
    "deit-small": ("timm", "deit_small_patch16_224"),
    "deit-base": ("timm", "deit_base_patch16_224"),
    "hivit-tiny": ("mmpretrain", "hivit/hivit-tiny-p16_16xb64_in1k.py"),
    "hivit-small": ("mmpretrain", "hivit/hivit-small-p16_16xb64_in1k.py"),
    "hivit-base": ("mmpretrain", "hivit/hivit-base-p16_16xb64_in1k.py"),
    "xcit-tiny": ("timm", "xcit_tiny_24_p16_224"),
    "xcit-small": ("timm", "xcit_small_24_p16_224"),
    "xcit-medium": ("timm", "xcit_medium_24_p16_224"),
    "resnet-50": ("timm", "resnet50"),
    "resnet-101": ("timm", "resnet101"),
    "vim-tiny": ("mmvmamba", "vim/vim-tiny_8xb128_in1k.py"),
    "vim-small": ("mmvmamba", "vim/vim-small_8xb64_in1k.py"),
    "vim-base": ("mmvmamba", "vim/vim-base_8xb64_in1k.py"),
    "nat-tiny": ("mmvmamba", "nat/nat-tiny_8xb128_in1k.py"),
    "nat-small": ("mmvmamba", "nat/nat-small_8xb128_in1k.py"),
    "nat-base": ("mmvmamba", "nat/nat-base_8xb128_in1k.py"),
    "s4nd-convnext-tiny": ("mmvmamba", "s4nd/s4nd-convnext-tiny_32xb120_in1k.py"),
    "s4nd-vit-base": ("mmvmamba", "s4nd/s4nd-vit-base_8xb128_in1k.py"),
}

Build = Callable[[tuple[int, int]], nn.Module]


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        name: What tables call it.
        build: Makes the module for images of a height and width, in pixels.
        classifies: Whether the module's output is logits, (B, classes).
        execution: How it runs, in place of what the case says; see `passes.Case`.
    """

    name: str
    build: Build
    classifies: bool = False
    execution: str | None = None


class Ranked(NamedTuple):
    """The output of a model that ranks or thresholds on the way (proposals, queries, masks).

    A rounding error can reorder it, so that only the features can be compared.
    """

    features: tuple[Tensor, ...]
    output: object


def build_of_timm(name: str, size: tuple[int, int] | None, **options) -> nn.Module:
    """Makes a model of timm with random weights.

    Args:
        name: What timm calls it.
        size: Height and width of the images in pixels, for models that are made for one size; None
            for the model's own.
        **options: Of `timm.create_model`.
    """
    import timm

    if size is not None and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = size
    return timm.create_model(name, **options)


def silence(model: nn.Module) -> None:
    """Turns dropout and stochastic depth off, in place.

    The libraries' defaults differ (stochastic depth from 0 to 0.2), and an output that is drawn
    cannot be compared.
    """
    for module in model.modules():
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def tensors(outputs) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in their order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors(value)


def number_of_parameters(model: nn.Module) -> int:
    """How many numbers a model's parameters are."""
    return sum(parameter.numel() for parameter in model.parameters())


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: those of its backbone's first convolution.

    A backbone that begins with something else says them as `image_channels`.
    """
    named = model.named_modules()
    backbone = next((part for name, part in named if f".{name}".endswith(".backbone")), model)
    if hasattr(backbone, "image_channels"):
        return backbone.image_channels
    convolutions = (part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    return next((convolution.in_channels for convolution in convolutions), 3)


def random_images(
    batch: int, size: tuple[int, int], device: torch.device, channels: int = 3
) -> Tensor:
    """Images of unit variance, (B, C, H, W), the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, *size, generator=generator).to(device)
