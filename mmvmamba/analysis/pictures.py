"""Annotations and predictions of all three tasks, drawn by the task's own visualizer.

Upstream draws while a test runs. Here a model runs on chosen images, those of a config's data set
or a user's own, and the drawn images are returned.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from torch import nn

from mmvmamba.engine.agreement import check_configured_names, check_model_and_data
from mmvmamba.engine.data import check_datasets
from mmvmamba.engine.data_checks import build_dataset
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.runner import load_strictly, model_weights
from mmvmamba.engine.tasks import first_dataset, scope_of, type_name
from mmvmamba.models.checkpoint import read_checkpoint

# How far beyond 0 and 255 augmentations take the numbers of a photograph.
AUGMENTED = 255

TRUTHS = ("gt_instances", "gt_sem_seg", "gt_panoptic_seg", "gt_label")


@dataclass(frozen=True)
class Pair:
    """An image drawn twice.

    Attributes:
        path: The image's file.
        image: The image itself, (H, W, 3), uint8, RGB.
        truth: It with its annotations; as it is if there are none.
        prediction: It with its predictions.
        sample: The model's data sample, with annotations and predictions.
    """

    path: Path
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    sample: BaseDataElement


def predict_and_draw(
    cfg: Config,
    checkpoint: str,
    images: list[Path] | None = None,
    limit: int | None = None,
    score_threshold: float = 0.3,
    device: str = "cpu",
) -> Iterator[Pair]:
    """Runs a model on images, and draws what it predicts and what is there.

    Args:
        cfg: The config, its data set where it is on this machine.
        checkpoint: The weights, which must fit.
        images: Files; those that belong to the test data set come with their annotations. None
            for that data set's images.
        limit: How many images are wanted at most.
        score_threshold: Of instances, those that are scored above are drawn.
        device: Where the model runs.

    Yields:
        A pair for each image.

    Raises:
        UsageError: If the test data set is asked for and not there.
        CheckpointError: If the weights cannot be read or do not fit.
    """
    init_default_scope(scope_of(cfg))
    content = read_checkpoint(checkpoint)
    model = load_model(cfg, content, checkpoint).to(device)
    dataset = _test_dataset(cfg, required=images is None)
    if dataset is None:
        meta = content.get("meta", {}).get("dataset_meta") or class_metainfo(cfg)
    else:
        check_model_and_data(cfg, model, dataset, content)
        meta = dataset.metainfo
    visualizer = build_visualizer(cfg, meta)
    steps = test_steps(cfg)
    loader, rgb = build_loader(cfg, steps), _loads_rgb(steps)
    for item in items(cfg, dataset, images, limit):
        with torch.no_grad():
            [sample] = model.test_step(pseudo_collate([item]))
        sample = sample.to("cpu")
        path = Path(sample.img_path)
        image = _read_picture(path, loader, rgb)
        yield Pair(
            path,
            image,
            draw_truth(visualizer, image, sample),
            draw_predictions(visualizer, image, sample, score_threshold),
            sample,
        )


def training_samples(
    cfg: Config, limit: int | None = None
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Draws what the training data set and its pipeline give to the model.

    Args:
        cfg: The config, its data set where it is on this machine.
        limit: How many images are wanted at most, from all over the data set, which may be sorted
            by class.

    Yields:
        The image's file, the image after the pipeline, (H, W, 3), uint8, RGB, and the same with
        its annotations.

    Raises:
        UsageError: If the config has no such data set, or it is not there.
    """
    init_default_scope(scope_of(cfg))
    if not cfg.get("train_dataloader"):
        raise UsageError(f"{cfg.filename} has no train_dataloader.")
    check_datasets(cfg, ("train",))
    check_configured_names(cfg)
    dataset = build_dataset(cfg.train_dataloader.dataset, training=True)
    visualizer = build_visualizer(cfg, dataset.metainfo)
    rgb = _loads_rgb(first_dataset(cfg.train_dataloader).get("pipeline", ()))
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        item = dataset[index]
        sample = item["data_samples"]
        image = as_picture(item["inputs"].numpy().transpose(1, 2, 0), rgb)
        yield Path(sample.img_path), image, draw_truth(visualizer, image, sample)


def test_steps(cfg: Config) -> list[dict]:
    """The steps of a config's test pipeline; none if it has no test data."""
    loader = cfg.get("test_dataloader")
    return list(first_dataset(loader).get("pipeline", ())) if loader else []


def build_loader(cfg: Config, steps: Sequence[dict]) -> Callable[[dict], dict] | None:
    """The step that reads image files, or None if there is none."""
    for step in steps:
        if type_name(step) == "LoadImageFromFile":
            init_default_scope(scope_of(cfg))
            return TRANSFORMS.build(step)
    return None


def _loads_rgb(steps: Sequence[dict]) -> bool:
    """Whether a pipeline's images have the file's order of channels, and not OpenCV's."""
    return any(step.get("imdecode_backend") == "tifffile" for step in steps)


def _read_picture(path: Path, loader: Callable[[dict], dict] | None, rgb: bool) -> np.ndarray:
    if loader is None:
        return mmcv.imread(path, channel_order="rgb")
    return as_picture(loader({"img_path": str(path)})["img"], rgb)


def as_picture(image: np.ndarray, rgb: bool = False) -> np.ndarray:
    """Makes a picture of what a pipeline loads, of any type and number of channels.

    Args:
        image: (H, W) or (H, W, C). Of other than three channels, the first three are drawn, or the
            first as gray.
        rgb: Whether three channels are RGB, and not BGR as OpenCV loads them.

    Returns:
        (H, W, 3), uint8, RGB. Numbers that are not from 0 to 255, nor from 0 to 1, go from black,
        the smallest, to white.
    """
    image = image.reshape(*image.shape[:2], -1)
    if image.shape[2] < 3:
        image = image[..., :1].repeat(3, axis=2)
    elif image.shape[2] > 3:
        image = image[..., :3]
    elif not rgb:
        image = image[..., ::-1]
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        low, high = float(image.min()), float(image.max())
        if low >= 0 and high <= 1:
            image = image * 255
        elif low < -AUGMENTED or high > 255 + AUGMENTED:
            image = (image - low) * (255 / (high - low))
        image = image.round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def build_visualizer(cfg: Config, dataset_meta: dict) -> Visualizer:
    """The config's visualizer, writing nothing itself.

    Args:
        cfg: The config.
        dataset_meta: The data set's classes and colours.
    """
    settings = {
        **cfg.visualizer,
        # mmengine keeps visualizers by name, and hands out the old one where it is known.
        "name": uuid.uuid4().hex,
        "vis_backends": None,
        "save_dir": None,
    }
    visualizer = VISUALIZERS.build(settings)
    visualizer.dataset_meta = dataset_meta
    return visualizer


def draw_truth(visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement) -> np.ndarray:
    """An image (H, W, 3), uint8, RGB, with the annotations that its data sample has, if any."""
    if not any(key in sample for key in TRUTHS):
        return image
    sample = sample.clone()
    boxes = sample.gt_instances.get("bboxes") if "gt_instances" in sample else None
    if hasattr(boxes, "tensor"):
        # The visualizer takes plain tensors.
        sample.gt_instances.bboxes = boxes.tensor
    return _draw(visualizer, image, sample, draw_gt=True, draw_pred=False)


def draw_predictions(
    visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement, threshold: float
) -> np.ndarray:
    """An image (H, W, 3), uint8, RGB, with the predictions that its data sample has.

    Args:
        visualizer: Of the sample's task.
        image: The image.
        sample: The data sample.
        threshold: Of instances, those that are scored above are drawn.
    """
    options = {"pred_score_thr": threshold} if "pred_instances" in sample else {}
    return _draw(visualizer, image, sample, draw_gt=False, draw_pred=True, **options)


def _draw(visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement, **options):
    # mmpretrain's visualizer has a method for each of its tasks.
    draw = getattr(visualizer, "visualize_cls", visualizer.add_datasample)
    draw(name="", image=image, data_sample=sample, **options)
    return visualizer.get_image()


def load_model(cfg: Config, content: dict, source: str) -> nn.Module:
    """Builds a config's model for evaluation.

    Args:
        cfg: The config.
        content: What a checkpoint holds.
        source: Where that comes from, for messages.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    settings = deepcopy(cfg.model)
    if "data_preprocessor" in cfg:
        # As mmengine's Runner does.
        settings.setdefault("data_preprocessor", cfg.data_preprocessor)
    # One process, which may be on the CPU.
    model = revert_sync_batchnorm(MODELS.build(settings))
    load_strictly(model, model_weights(content, source), source)
    return model.eval()


def _test_dataset(cfg: Config, required: bool) -> BaseDataset | None:
    try:
        check_datasets(cfg, ("test",))
    except UsageError:
        if required:
            raise
        return None
    return build_dataset(cfg.test_dataloader.dataset)


def class_metainfo(cfg: Config) -> dict:
    """What the data set's class says of it, without the data."""
    kind = first_dataset(cfg.test_dataloader).type
    return (DATASETS.get(kind) if isinstance(kind, str) else kind).METAINFO


def items(
    cfg: Config, dataset: BaseDataset | None, images: list[Path] | None, limit: int | None
) -> Iterator[dict]:
    """What the test pipeline makes of the images."""
    if images is None:
        for index in range(len(dataset) if limit is None else min(limit, len(dataset))):
            yield dataset[index]
        return
    size = 0 if dataset is None else len(dataset)
    known = {Path(dataset.get_data_info(i)["img_path"]).resolve(): i for i in range(size)}
    plain = Compose([step for step in test_steps(cfg) if "Annotations" not in type_name(step)])
    for number, path in enumerate(images[:limit]):
        index = known.get(path.resolve())
        if index is not None:
            yield dataset[index]
        else:
            yield plain({"img_path": str(path), "img_id": number})
