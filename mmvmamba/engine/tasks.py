"""What differs between detection, segmentation and classification on the command line.

A config's `default_scope` says which it is. Each function changes a config in place, the way the
task's upstream package expects it.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict

from mmvmamba.engine.data import unwrap
from mmvmamba.engine.errors import UsageError

FLIPS = [{"type": "RandomFlip", "prob": 1.0}, {"type": "RandomFlip", "prob": 0.0}]


def type_name(settings: Mapping | None) -> str:
    """The class that settings are of, without its scope; '' if they do not say.

    The types of new-style configs are classes, those of others are names.
    """
    kind = (settings or {}).get("type") or ""
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def scope_of(cfg: Config) -> str:
    """The package whose models and data sets a config uses.

    New-style configs need not say, where their model's class does.

    Raises:
        UsageError: If neither does.
    """
    scope = cfg.get("default_scope")
    kind = (cfg.get("model") or {}).get("type")
    if not scope and isinstance(kind, type):
        # What is added on the command line is named, and looked up in it.
        scope = cfg.default_scope = kind.__module__.partition(".")[0]
    if not scope:
        raise UsageError(
            f"{cfg.filename} has no default_scope, so it is not known whether it is detection, "
            "segmentation or classification: inherit from mmdet::, mmseg:: or mmpretrain:: "
            "_base_/default_runtime.py, or set default_scope."
        )
    return scope


def set_loader_defaults(cfg: Config) -> None:
    """Fills in the data loader settings that a task's upstream tools add.

    mmpretrain's configs count on their batches being stacked by the loader. And with
    `num_workers=0`, as a debugger needs, there are no workers to keep.
    """
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader")
        if not loader:
            continue
        if cfg.get("default_scope") == "mmpretrain":
            loader.setdefault("collate_fn", {"type": "default_collate"})
            loader.setdefault("pin_memory", torch.cuda.is_available())
            loader.setdefault("persistent_workers", True)
        if loader.get("num_workers") == 0:
            loader.persistent_workers = False


def enable_tta(cfg: Config) -> None:
    """Turns test-time augmentation on.

    The config's `tta_model` and `tta_pipeline` say how; without them detection and classification
    average over the image and its mirror image, as upstream does.

    Raises:
        UsageError: If the config does not say how and the task has no default, or the model
            predicts masks, which mmdet cannot merge.
    """
    scope = scope_of(cfg)
    if scope == "mmdet" and (cfg.model.get("roi_head") or cfg.model).get("mask_head"):
        raise UsageError(
            "--tta: mmdet's test-time augmentation merges boxes, not masks. For the boxes alone, "
            "add: --cfg-options model.roi_head.mask_head=None test_evaluator.metric=bbox "
            "\"load_ignore=['roi_head.mask_head']\""
        )
    if "tta_model" not in cfg:
        if scope == "mmdet":
            nms = {"type": "nms", "iou_threshold": 0.5}
            cfg.tta_model = {"type": "DetTTAModel", "tta_cfg": {"nms": nms, "max_per_img": 100}}
        elif scope == "mmpretrain":
            cfg.tta_model = {"type": "AverageClsScoreTTA"}
    if "tta_pipeline" not in cfg and scope in ("mmdet", "mmpretrain"):
        *steps, pack = deepcopy(first_dataset(cfg.test_dataloader).pipeline)
        if scope == "mmdet":
            keys = pack.get("meta_keys", ("img_id", "img_path", "ori_shape", "img_shape"))
            needed = ("scale_factor", "flip", "flip_direction")
            pack.meta_keys = (*(key for key in keys if key not in needed), *needed)
        cfg.tta_pipeline = [*steps, {"type": "TestTimeAug", "transforms": [FLIPS, [pack]]}]
    missing = [key for key in ("tta_model", "tta_pipeline") if key not in cfg]
    if missing:
        raise UsageError(
            f"--tta: the config has no {' and no '.join(missing)}. Inherit from "
            "mmseg::_base_/default_runtime.py and a data set config that has a tta_pipeline."
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in unwrap(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline


def first_dataset(loader: ConfigDict) -> ConfigDict:
    """The config of a loader's data set inside wrappers (RepeatDataset, ConcatDataset, ...)."""
    return next(unwrap(loader.dataset))


def enable_drawing(cfg: Config, show_dir: str | None, show: bool, wait_time: float) -> None:
    """Makes a test draw its predictions.

    Args:
        cfg: The config.
        show_dir: Folder for the pictures, or None.
        show: Whether to open a window.
        wait_time: Seconds that each picture stays in the window.

    Raises:
        UsageError: If the config has no visualisation hook, or images that upstream's cannot draw.
    """
    model = cfg.model.get("module", cfg.model)
    channels = (model.get("backbone") or {}).get("in_channels", 3)
    if channels > 4:
        raise UsageError(
            f"--show and --show-dir: the model's images have {channels} channels, and upstream's "
            "hooks draw on photographs. Draw with tools/analysis_tools/visualize.py CONFIG "
            "CHECKPOINT."
        )
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if not hook:
        raise UsageError(
            "--show and --show-dir need a visualization hook in the config's default_hooks: "
            "inherit from mmdet::, mmseg:: or mmpretrain:: _base_/default_runtime.py."
        )
    # Every image, where upstream's hooks would draw one in 50 or 5000.
    hook.update(show=show, wait_time=wait_time, interval=1)
    folder = str(Path(show_dir).expanduser().absolute()) if show_dir else None
    scope = scope_of(cfg)
    if scope == "mmpretrain":
        hook.update(enable=True, out_dir=folder)
        return
    hook.draw = True
    if folder and scope == "mmdet":
        hook.test_out_dir = folder
    elif folder:
        cfg.visualizer.save_dir = folder


def add_prediction_dump(cfg: Config, out: str) -> None:
    """Makes a test write its predictions.

    Args:
        cfg: The config.
        out: A .pkl file; for segmentation also a folder, which gets one PNG per image.

    Raises:
        UsageError: If the name is neither.
    """
    scope = scope_of(cfg)
    evaluators = cfg.test_evaluator
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    if out.endswith((".pkl", ".pickle")):
        dump = "DumpDetResults" if scope == "mmdet" else "DumpResults"
        evaluators = [*evaluators, {"type": dump, "out_file_path": out}]
    elif scope == "mmseg" and not Path(out).suffix:
        for evaluator in evaluators:
            evaluator.output_dir = out
    else:
        folder = " or a folder" if scope == "mmseg" else ""
        raise UsageError(f"--out {out}: expected a file name that ends in .pkl{folder}.")
    cfg.test_evaluator = evaluators
