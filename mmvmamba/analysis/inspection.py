"""What is looked at: backbones with random or trained weights, and a user's own images."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from mmvmamba.analysis.measured import PEERS, image_channels
from mmvmamba.analysis.pictures import build_loader, test_steps
from mmvmamba.analysis.subjects import find_subject, is_config
from mmvmamba.datasets.own_data import SUFFIXES
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.runner import load_strictly
from mmvmamba.models import VMamba
from mmvmamba.models.checkpoint import (
    CheckpointError,
    find_state_dict,
    read_checkpoint,
    split_pretrained,
)

# Of ImageNet's colours, from 0 to 1: what the configs of all three tasks and timm's models take.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_backbone(
    name: str,
    size: tuple[int, int],
    checkpoint: str | None = None,
    seed: int = 0,
    overrides: Mapping[str, object] | None = None,
) -> nn.Module:
    """Makes a backbone in evaluation mode.

    Args:
        name: As `find_subject` takes it.
        size: Height and width of the images in pixels, for models that are made for one size.
        checkpoint: The weights, of the backbone or of a whole model; None for random ones.
        seed: Of random weights.
        overrides: Settings that replace those of a config.

    Raises:
        ValueError: If there is no such model.
        UsageError: If there is no such config.
        CheckpointError: If the weights cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = find_subject(name, backbone_only=True, overrides=overrides).build(size)
        if isinstance(model, BaseModule):
            # As in training, but for what would come from a file.
            model.init_cfg = split_pretrained(model.init_cfg)[1] or None
            model.init_weights()
    if checkpoint is not None:
        model = _load(model, name, size, checkpoint)
    # Upstream's backbones return nothing here.
    model.eval()
    return model


def _load(model: nn.Module, name: str, size: tuple[int, int], checkpoint: str) -> nn.Module:
    if isinstance(model, VMamba):
        model.load_pretrained(checkpoint)
        return model
    _, state = find_state_dict(read_checkpoint(checkpoint), checkpoint)
    if type(model).__module__.startswith("timm."):
        return _timm_backbone(name, size, state, checkpoint)
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    load_strictly(model, own or state, checkpoint)
    return model


def _timm_backbone(name: str, size: tuple[int, int], state: dict, source: str) -> nn.Module:
    """A model of timm with a classifier's weights.

    They are loaded before timm takes the classifier apart, which renames the parameters.
    """
    import timm

    _, target = PEERS.get(name, ("timm", name))
    config = timm.get_pretrained_cfg(target)
    kind = {"img_size": size} if getattr(config, "fixed_input_size", False) else {}
    # timm itself says nothing of parameters that a file lacks.
    with torch.device("meta"):
        expected = timm.create_model(target, num_classes=0, **kind).state_dict()
    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(
            f"{source} does not fit timm's {target}, whose keys it must have: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''} "
            f"({len(missing)} of {len(expected)}) are missing."
        )
    try:
        return timm.create_model(
            target,
            features_only=True,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "file": None, "url": None},
            **kind,
        )
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit timm's {target}: {error}") from error


def find_images(paths: Sequence[str | Path], limit: int | None = None) -> list[Path]:
    """The picture files that paths name, folders searched with their sub-folders.

    Other files of folders are left out, and counted in the log.

    Args:
        paths: Files and folders.
        limit: How many are wanted at most.

    Raises:
        UsageError: If a path does not exist or there is no picture.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            found += [p for p in files if p.suffix.lower() in SUFFIXES]
            others.update(p.suffix or p.name for p in files if p.suffix.lower() not in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"no image or folder {path} (working directory: {Path.cwd()}).")
    if not found:
        there = f"; there are {_counted(others)}" if others else ""
        raise UsageError(
            f"no picture ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}{there}."
        )
    if others:
        print_log(
            f"left out, as no pictures ({', '.join(SUFFIXES)}): {_counted(others)}",
            logger="current",
            level=logging.WARNING,
        )
    return found[:limit]


def image_reader(
    model: nn.Module,
    name: str,
    size: tuple[int, int],
    overrides: Mapping[str, object] | None = None,
) -> Callable[[Path], Tensor]:
    """What reads pictures as a model takes them, see `read_image`.

    Args:
        model: The model.
        name: What `build_backbone` made it from.
        size: Height and width in pixels.
        overrides: Settings that replace those of a config.
    """
    channels = image_channels(model)
    # Photographs are read in one way for all models.
    cfg = load_config(name, overrides) if channels != 3 and is_config(name) else None
    return lambda path: read_image(path, size, channels, cfg)


def _counted(suffixes: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))


def read_image(
    path: Path, size: tuple[int, int], channels: int = 3, cfg: Config | None = None
) -> Tensor:
    """Reads a picture, scaled to fill a size and cut to it around the centre.

    Args:
        path: The file.
        size: Height and width in pixels.
        channels: Of the model's images. Three are a photograph's, in ImageNet's colours.
        cfg: The model's config, which says how images of other channels are loaded and
            normalised. Without one, each channel is brought to mean 0 and variance 1.

    Returns:
        (channels, H, W), normalised as the models take it.

    Raises:
        UsageError: If it is no picture, or one of other channels.
    """
    if channels != 3:
        return _read_bands(path, size, channels, cfg)
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}") from error
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    wide, high = (
        max(round(side * scale), least)
        for side, least in ((picture.width, width), (picture.height, height))
    )
    left, top = (wide - width) // 2, (high - height) // 2
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _read_bands(path: Path, size: tuple[int, int], channels: int, cfg: Config | None) -> Tensor:
    steps = test_steps(cfg) if cfg else []
    backend = "tifffile" if path.suffix.lower() in (".tif", ".tiff") else None
    color = "grayscale" if channels == 1 else "unchanged"
    plain = {"type": "LoadImageFromFile", "color_type": color, "imdecode_backend": backend}
    loader = build_loader(cfg, steps) or TRANSFORMS.build(plain)
    try:
        pixels = loader({"img_path": str(path)})["img"]
    except Exception as error:
        # Each library that decodes has errors of its own, tifffile's older ones no ValueErrors.
        raise UsageError(f"{path} cannot be read as a picture: {error}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] != channels:
        raise UsageError(
            f"{path} has {pixels.shape[2]} channels as it is loaded, the model takes {channels}: "
            "see LoadImageFromFile in the config's pipelines (color_type, imdecode_backend)."
        )
    image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).permute(2, 0, 1)
    height, width = size
    scale = max(height / image.shape[1], width / image.shape[2])
    enlarged = [
        max(round(n * scale), least) for n, least in zip(image.shape[1:], size, strict=True)
    ]
    image = F.interpolate(image[None], enlarged, mode="bicubic", antialias=True)[0]
    top, left = ((n - least) // 2 for n, least in zip(enlarged, size, strict=True))
    image = image[:, top : top + height, left : left + width]
    settings = (cfg and (cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor"))) or {}
    if settings.get("mean") and settings.get("std"):
        mean, std = (torch.tensor(settings[key], dtype=torch.float32) for key in ("mean", "std"))
    else:
        mean, std = image.mean((1, 2)), image.std((1, 2)).clamp_min(1e-6)
    return (image - mean[:, None, None]) / std[:, None, None]


def shown(image: Tensor) -> np.ndarray:
    """A normalised image (C, H, W) as matplotlib draws it, (H, W, 3) from 0 to 1.

    Of other than three channels, the first three, or the first as gray, from dark to bright.
    """
    if image.shape[0] != 3:
        bands = image.cpu()[: 3 if image.shape[0] > 3 else 1]
        bands = (bands - bands.min()) / (bands.max() - bands.min()).clamp_min(1e-6)
        return bands.expand(3, -1, -1).permute(1, 2, 0).numpy()
    pixels = image.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return pixels.clamp(0, 1).permute(1, 2, 0).numpy()


def save_figure(figure, file: str | Path) -> None:
    """Writes a figure of matplotlib; its folder is made if need be."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
