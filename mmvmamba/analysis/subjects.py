"""The models that are measured: VMamba by name, its peers, and any config's model.

All of them are built with random weights, and become modules from images (B, C, H, W) to tensors.
"""

import difflib
import importlib.util
import inspect
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mmvmamba.analysis.measured import NUM_CLASSES, PEERS, Ranked, Subject, build_of_timm
from mmvmamba.compat import install_command
from mmvmamba.engine.cli import load_config, tell_notices
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import scope_of
from mmvmamba.models import VMamba
from mmvmamba.registry import MODELS

CHECKPOINTING = "+cp"

# What makes a classifier's backbone one that stands alone, whose last output is a normalised map.
BACKBONE_SETTINGS = {
    "mmvmamba.NAT": {"outnorm": True},
    "mmvmamba.S4NDConvNeXt": {"gap_before_final_norm": False},
    "mmvmamba.S4NDViT": {"outnorm": True},
    "mmvmamba.VisionMamba": {"out_type": "featmap"},
}


def find_subject(
    name: str, backbone_only: bool = False, overrides: Mapping[str, object] | None = None
) -> Subject:
    """Looks up what is to be measured.

    Args:
        name: A config ('file.py' or 'package::folder/file.py'), or what `build_classifier` takes.
        backbone_only: Leaves heads and necks out. Libraries differ in what else belongs to a
            backbone: those of `VMamba` and mmpretrain normalise their maps, timm's do not.
        overrides: Settings that replace those of a config, as `--cfg-options` gives them.

    Raises:
        UsageError: If there is no such config, or it is of another package than mmpretrain, mmdet
            and mmseg.
        ValueError: If there is no such model; the message has the nearest names.
    """
    if is_config(name):
        cfg = load_config(name, overrides)
        tell_notices(cfg)
        return config_subject(Path(name.rpartition("::")[2]).stem, cfg, backbone_only)
    _check_name(name)
    return Subject(
        name,
        lambda size: _build_by_name(name, size, backbone_only),
        classifies=not backbone_only,
    )


def is_config(name: str) -> bool:
    """Whether a model is named by a config ('file.py' or 'package::folder/file.py')."""
    return name.endswith(".py") or "::" in name


def build_classifier(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """Makes a classifier of 1000 classes with random weights.

    Args:
        name: An arch of `VMamba`, with '+cp' behind it for gradient checkpointing; a short name of
            `PEERS`; or the name of a model of timm.
        size: Height and width of the images in pixels, for models that are made for one size; None
            for what they were trained with.

    Raises:
        ValueError: If it is none of them; the message has the nearest names.
    """
    _check_name(name)
    return _build_by_name(name, size, backbone_only=False)


def _check_name(name: str) -> None:
    archs = (*VMamba.arch_aliases, *VMamba.arch_settings)
    if name.removesuffix(CHECKPOINTING) in archs:
        return
    library, _ = PEERS.get(name, ("timm", name))
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"{name!r} is no arch of VMamba ({', '.join(archs)}), and for models of {library} that "
            f"package is not installed: {install_command(library)}"
        )
    if name in PEERS:
        return
    import timm

    if timm.is_model(name):
        return
    known = (*archs, *PEERS, *timm.list_models())
    near = difflib.get_close_matches(name.replace("_", "-"), known, n=3)
    near += difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    raise ValueError(
        f"{name!r} is neither an arch of VMamba, nor a peer, nor a model of timm.{hint} "
        f"Archs: {', '.join(archs)}. Peers: {', '.join(PEERS)}. timm.list_models() names the rest; "
        "configs end in .py."
    )


def _build_by_name(name: str, size: tuple[int, int] | None, backbone_only: bool) -> nn.Module:
    arch = name.removesuffix(CHECKPOINTING)
    if arch in VMamba.arch_settings or arch in VMamba.arch_aliases:
        return _build_vmamba(arch, arch != name, backbone_only)
    library, target = PEERS.get(name, ("timm", name))
    if library != "timm":
        cfg = load_config(f"{library}::{target}").model
        if size is not None and "img_size" in cfg.backbone:
            cfg.backbone.img_size = size
        if backbone_only:
            cfg.backbone.update(BACKBONE_SETTINGS.get(cfg.backbone.type, {}))
        return _build_from_config("mmpretrain", cfg, backbone_only)
    kind = {"features_only": True} if backbone_only else {"num_classes": NUM_CLASSES}
    return build_of_timm(target, size, **kind)


def _build_vmamba(arch: str, with_cp: bool, backbone_only: bool) -> nn.Module:
    if backbone_only:
        return VMamba(arch, with_cp=with_cp)
    backbone = VMamba(arch, out_indices=(-1,), outnorm=False, with_cp=with_cp)
    head = {
        "type": "mmvmamba.VMambaClsHead",
        "num_classes": NUM_CLASSES,
        "in_channels": backbone.arch.dims[-1],
    }
    return nn.Sequential(backbone, MODELS.build(head))


def config_subject(name: str, cfg: Config, backbone_only: bool = False) -> Subject:
    """A config's model, by a name of choice.

    Raises:
        UsageError: If the config is of another package than mmpretrain, mmdet and mmseg.
    """
    scope = scope_of(cfg)
    if scope not in ("mmpretrain", "mmdet", "mmseg"):
        raise UsageError(f"{name} is of {scope!r}; measured are mmpretrain, mmdet and mmseg.")
    return Subject(
        name,
        lambda _: _build_from_config(scope, cfg.model, backbone_only),
        classifies=scope == "mmpretrain" and not backbone_only,
    )


def _build_from_config(scope: str, cfg: ConfigDict, backbone_only: bool) -> nn.Module:
    # Detectors write into the parts that they are made of.
    parts = deepcopy(cfg.backbone if backbone_only else cfg)
    # One process, which may be on the CPU.
    model = revert_sync_batchnorm(MODELS.build(parts | {"_scope_": scope}))
    return model if backbone_only else PlainModel(scope, model)


class PlainModel(nn.Module):
    """A model of mmpretrain, mmdet or mmseg without pre- and post-processing.

    Args:
        scope: The package whose model it is.
        model: The model.
    """

    def __init__(self, scope: str, model: nn.Module):
        super().__init__()
        self.scope, self.model = scope, model

    def forward(self, images: Tensor):
        """The model's raw output."""
        if self.scope == "mmpretrain":
            return self.model(images, mode="tensor")
        samples = _samples(self.scope, images)
        if self.scope == "mmdet":
            return self._detect(images, samples)
        if "batch_data_samples" in inspect.signature(self.model.decode_head.forward).parameters:
            # mmseg does not hand the samples on to heads that come from mmdet.
            features = self.model.extract_feat(images)
            return Ranked(features, self.model.decode_head(features, samples))
        return self.model(images, samples, mode="tensor")

    def _detect(self, images: Tensor, samples: list) -> Ranked:
        kept, extract = [], self.model.extract_feat

        def extract_and_keep(batch: Tensor):
            # mmcv's operators read maps of any strides as if they were NCHW in memory.
            kept.append(tuple(feature.contiguous() for feature in extract(batch)))
            return kept[-1]

        self.model.extract_feat = extract_and_keep
        try:
            output = self.model(images, samples, mode="tensor")
        finally:
            del self.model.extract_feat
        return Ranked(kept[-1], output)


def _samples(scope: str, images: Tensor) -> list:
    """What detectors and segmentors are told of images that fill their batch."""
    height_width = tuple(images.shape[-2:])
    keys = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
    metainfo = dict.fromkeys(keys, height_width) | {"scale_factor": (1.0, 1.0), "img_id": 0}
    if scope == "mmdet":
        from mmdet.structures import DetDataSample as DataSample
    else:
        from mmseg.structures import SegDataSample as DataSample
    return [DataSample(metainfo=metainfo) for _ in images]
