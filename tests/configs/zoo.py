"""What the tests of the configs share: the configs, small versions of their models, and batches."""

import functools
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmvmamba.models import NAT, VisionMamba, VMamba
from mmvmamba.registry import MODELS

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (PROJECT / "configs").rglob("*.py") if "_base_" not in p.parts)
SIZE = 64
WIDTH = 16

# What makes upstream's heads heavy, and how much of it is enough to run every line of them.
LIMITS = {
    "num_layers": 1,
    "num_queries": 20,
    "num_dn_queries": 10,
    "num_points": 256,
    "nms_pre": 100,
    "max_per_img": 20,
    "num": 16,
}
# Upstream's own widths, a quarter of which is enough. Those of transformers are narrow as they are.
WIDTHS = {
    "in_channels",
    "out_channels",
    "channels",
    "feat_channels",
    "conv_out_channels",
    "fc_out_channels",
}


@functools.cache
def _loaded(path: Path) -> Config:
    return Config.fromfile(path)


def load(path: Path) -> Config:
    """A config of the zoo, the caller's own copy."""
    return deepcopy(_loaded(path))


def shrink(cfg: Config) -> Config:
    """Makes a config's model small enough for a training step in a second on one core.

    The backbone keeps its arch but for the size: one block per stage, never dropped, and 16
    channels in the first stage. Necks and heads are told of the new channels and are otherwise the
    config's own, a quarter as wide (`WIDTHS`), with fewer layers, queries and samples where there
    are many (`LIMITS`). Nothing is downloaded.
    """
    backbone = cfg.model.backbone
    channels = SHRINK[backbone.type](backbone)
    backbone.drop_path_rate = 0.0
    backbone.init_cfg = None
    if (cfg.model.get("init_cfg") or {}).get("type") == "Pretrained":
        cfg.model.init_cfg = None

    # The first part that has them receives the backbone's maps.
    parts = ("neck",) if cfg.model.get("neck") else ("head", "decode_head", "auxiliary_head")
    receivers = [cfg.model[name] for name in parts if cfg.model.get(name)]
    received = [part.pop("in_channels", None) for part in receivers]
    _limit(cfg.model, narrow="num_queries" not in repr(cfg.model))
    for part, found in zip(receivers, received, strict=True):
        if found is not None:
            many = isinstance(found, list | tuple)
            part.in_channels = [channels[c] for c in found] if many else channels[found]
    preprocessor = cfg.model.get("data_preprocessor", {})
    if preprocessor.get("size"):
        # Segmentors pad to their crop.
        preprocessor.size = (SIZE, SIZE)
    elif preprocessor.get("pad_size_divisor", 0) > SIZE:
        preprocessor.pad_size_divisor = SIZE
    return cfg


def _shrink_vmamba(backbone: ConfigDict) -> dict[int, int]:
    """Changes the settings; returns the new channels of each map by the old ones."""
    arch = VMamba.find_arch(backbone.arch)
    dims = [WIDTH * 2**i for i in range(len(arch.dims))]
    backbone.arch = dict(vars(arch) | {"dims": dims, "depths": (1,) * len(dims)})
    return dict(zip(arch.dims, dims, strict=True))


def _shrink_nat(backbone: ConfigDict) -> dict[int, int]:
    # A head has 32 channels.
    arch, dims = NAT.arch_settings[backbone.arch], 2 * WIDTH
    depths = (1,) * len(arch.depths)
    backbone.arch = arch._replace(dims=dims, depths=depths)._asdict()
    return {arch.dims * 2**i: dims * 2**i for i in range(len(depths))}


def _shrink_s4nd_vit(backbone: ConfigDict) -> dict[int, int]:
    backbone.update(dim=WIDTH, depth=2, d_state=4)
    return {768: WIDTH}


def _shrink_s4nd_convnext(backbone: ConfigDict) -> dict[int, int]:
    dims = [WIDTH * 2**i for i in range(4)]
    # What is called channels will be a quarter as wide.
    channels = [4 * dim for dim in dims]
    backbone.update(arch={"depths": [1] * 4, "channels": channels}, d_state=4)
    return {768: dims[-1]}


def _shrink_vim(backbone: ConfigDict) -> dict[int, int]:
    # As many blocks as maps are taken from.
    arch, depth = VisionMamba.find_arch(backbone.arch), len(backbone.get("out_indices", [0]))
    backbone.arch = dict(vars(arch) | {"dims": WIDTH, "depth": depth})
    backbone.update(out_indices=tuple(range(depth)), img_size=SIZE)
    return {arch.dims: WIDTH}


SHRINK = {
    "mmvmamba.VMamba": _shrink_vmamba,
    "mmvmamba.VisionMamba": _shrink_vim,
    "mmvmamba.NAT": _shrink_nat,
    "mmvmamba.S4NDViT": _shrink_s4nd_vit,
    "mmvmamba.S4NDConvNeXt": _shrink_s4nd_convnext,
}


def _limit(node, narrow: bool) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if narrow and key in WIDTHS:
            many = isinstance(value, list | tuple)
            node[key] = [width // 4 for width in value] if many else value // 4
        elif isinstance(value, dict | list):
            _limit(value, narrow)
        elif key in LIMITS and isinstance(value, int):
            node[key] = min(value, LIMITS[key])


def build(cfg: Config) -> nn.Module:
    """Builds a config's model, with plain batch norms where SyncBN would need a GPU.

    Its weights are initialised as a runner's are: some of upstream's parameters, such as the level
    embeddings of DINO, are whatever the memory held until then.
    """
    init_default_scope(cfg.default_scope)
    if "data_preprocessor" in cfg:
        # As mmengine's Runner does.
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(cfg.model | {"_scope_": cfg.default_scope}))
    model.init_weights()
    return model


def each_step(optim_wrapper: ConfigDict) -> ConfigDict:
    """Settings of the same optimizer that update in every step."""
    optim_wrapper.pop("accumulative_counts", None)
    return optim_wrapper


def plain(settings):
    """Settings as plain data: tuples as lists, without the scopes that mmengine writes."""
    if isinstance(settings, Config | dict):
        return {key: plain(value) for key, value in settings.items() if key != "_scope_"}
    return [plain(one) for one in settings] if isinstance(settings, list | tuple) else settings


def batch(cfg: Config) -> dict:
    """Two random images with the annotations that the config's task needs."""
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in range(2)]
    make_sample = SAMPLES[cfg.default_scope]
    if cfg.default_scope == "mmpretrain":
        # Its loader stacks the images.
        images = torch.stack(images)
    return {"inputs": images, "data_samples": [make_sample(cfg.model) for _ in range(2)]}


def _metainfo() -> dict:
    shapes = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
    return dict.fromkeys(shapes, (SIZE, SIZE)) | {"scale_factor": (1.0, 1.0)}


def _detection_sample(_):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 10.0, 60.0, 30.0]])
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=_metainfo())
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.tensor([0, 1]),
        masks=BitmapMasks(masks.numpy(), SIZE, SIZE),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    return sample


def _segmentation_sample(model):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_metainfo())
    classes = model.decode_head.num_classes
    sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, SIZE, SIZE)))
    return sample


def _classification_sample(model):
    from mmpretrain.structures import DataSample

    classes = model.head.num_classes
    return DataSample(metainfo=_metainfo() | {"num_classes": classes}).set_gt_label(1)


SAMPLES = {
    "mmdet": _detection_sample,
    "mmseg": _segmentation_sample,
    "mmpretrain": _classification_sample,
}
