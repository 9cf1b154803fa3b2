"""What a data set holds: damage is refused by its file's name, what is left out is counted.

Upstream's data sets leave images and annotations out without a word, draw another image in place of
one that their pipeline gives nothing for, and name no file in most errors. Their ways stay as they
are: `build_dataloader` looks at the files before and at the data sets after.
"""

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.dist import is_main_process
from mmengine.fileio import list_from_file
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmvmamba.engine.class_names import (
    check_categories,
    check_class_names,
    names_of,
    number_coco_by_name,
    number_folders_by_name,
)
from mmvmamba.engine.coco_file import Listed, read_coco
from mmvmamba.engine.data import dataset_paths, unwrap, with_home
from mmvmamba.engine.errors import DataError

# Before its version 5, OpenCV makes up what a JPEG lacks, in gray.
OPENCV_FILLS_UP = int(cv2.__version__.split(".")[0]) < 5

# What the system says of a file that is not there, or None where a library found fault with it.
NO_SUCH_FILE = (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)


def build_dataloader(
    config: DataLoader | dict,
    seed: int | None = None,
    diff_rank_seed: bool = False,
    training: bool = False,
) -> DataLoader:
    """Builds a data loader as mmengine does, over data sets that are counted and checked.

    Args:
        config: As mmengine's `Runner.build_dataloader` takes it.
        seed: As mmengine's.
        diff_rank_seed: As mmengine's.
        training: Whether another image may stand in for one that the pipeline gives nothing for, as
            in a training. Upstream's classifiers do so in their tests too.

    Raises:
        DataError: If an annotation file cannot be read or holds what upstream does not survive, or
            nothing is left of a data set. Iterating the loader raises it for a file that cannot be
            used: see `CheckedPipeline`.
    """
    if isinstance(config, DataLoader):
        return config
    dataset = with_home(config.get("dataset"))
    config = {**config, "dataset": dataset}
    return _checked(
        dataset, training, lambda: Runner.build_dataloader(config, seed, diff_rank_seed)
    )


def build_dataset(config: dict, training: bool = False) -> Dataset:
    """Builds a data set that is counted and checked as `build_dataloader`'s are.

    Args:
        config: The data set's config.
        training: See `build_dataloader`.

    Raises:
        DataError: See `build_dataloader`.
    """
    config = with_home(config)
    return _checked(config, training, lambda: DATASETS.build(config))


def _checked(
    config: dict, training: bool, build: Callable[[], DataLoader | Dataset]
) -> DataLoader | Dataset:
    """What `build` makes of a data set's config, its files looked at before and it after."""
    files = {_annotations(one): one for one in _local_configs(config)}
    listed = {}
    for one in unwrap(config):
        check_class_names(one)
        kind = _class_of(one)
        if hasattr(kind, "COCOAPI"):
            number_coco_by_name()
        elif hasattr(kind, "_find_samples"):
            number_folders_by_name()
    for path, one in files.items():
        # One process speaks for all, which it holds up until it is done.
        if path and path.is_file() and hasattr(_class_of(one), "COCOAPI") and is_main_process():
            masks = _reads_masks(one)
            content = listed[path] = read_coco(path, masks_evaluated=masks and not training)
            classes, given = classes_of(one)
            if content and classes:
                try:
                    check_categories(content.categories, classes, given)
                except DataError as error:
                    raise DataError(f"{path}: {error}") from error
            if masks and content and content.shapeless == content.annotations > 0:
                raise DataError(
                    f"{path}: none of its {content.annotations} objects has a mask of three points "
                    "or more (segmentation), and the model learns from masks. Add masks, or "
                    "use a model of boxes only, such as Faster R-CNN."
                )
        elif path and path.is_file() and path.suffix == ".json" and is_main_process():
            _check_own_names(path, one)
    names = ", ".join(str(path or one.get("data_root")) for path, one in files.items())
    try:
        built = build()
    except (ValueError, TypeError, LookupError, AssertionError, RuntimeError) as error:
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        if "need at least one array" in reason:
            unused = sum((one.unused for one in listed.values() if one), Counter())
            reason = (
                "nothing is left of it. Check the paths, the suffixes of the files, the classes' "
                f"names and filter_cfg.{_joined(' Left out: ', unused, 'objects')}"
            )
        if "nothing is left" in reason or "Found 0 files" in reason:
            roots = [Path(one.get("data_root") or ".") for one in files.values()]
            folders = [*roots, *(path for one in files.values() for path in dataset_paths(one))]
            outer = {parent for path in folders for parent in path.parents}
            found = _suffixes({path for path in folders if path.is_dir()} - outer)
            reason = f"{reason.rstrip('.')}. In its folders are: {_listed(found) or 'no files'}."
        raise DataError(f"no data loader for {names}: {reason}") from error
    for dataset in base_datasets(built.dataset if isinstance(built, DataLoader) else built):
        if isinstance(dataset.pipeline, Compose):
            dataset.pipeline = CheckedPipeline(dataset, training)
        if is_main_process():
            _log_size(dataset, listed.get(Path(dataset.ann_file or "")))
    return built


def _check_own_names(path: Path, dataset: dict) -> None:
    """Compares the classes of a list in mmengine's format with the config's, which replace them.

    The labels are numbers in the file's own.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        # The data set itself says what it cannot read.
        return
    metainfo = content.get("metainfo") if isinstance(content, dict) else None
    own = metainfo.get("classes") if isinstance(metainfo, dict) else None
    classes, given = classes_of(dataset)
    if given and own and classes and list(own) != classes:
        raise DataError(
            f"{path}: its labels are numbers of its own classes (metainfo), and the config gives "
            f"others.\n  file: {names_of(own)}\n  config: {names_of(classes)}\n  Leave classes out "
            "of the config, or give it the file's."
        )


def base_datasets(dataset: Dataset) -> Iterator[BaseDataset]:
    """Yields the data sets inside wrappers (RepeatDataset, ConcatDataset, ...)."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for name in ("dataset", "_dataset", "datasets"):
        inner = getattr(dataset, name, None) or ()
        for one in inner if isinstance(inner, list | tuple) else (inner,):
            yield from base_datasets(one)


def _log_size(dataset: BaseDataset, listed: Listed | None) -> None:
    """Logs how much of what a data set lists is used, and what is left out or filled in."""
    where = dataset.ann_file or ", ".join(str(p) for p in dataset.data_prefix.values() if p)
    used, left_out, filled = len(dataset), {}, {}
    text = f"{type(dataset).__name__} ({where}): "
    if hasattr(dataset, "get_len_per_video"):
        text += f"{used} videos"
    elif listed:
        labels = Counter()
        for index in range(used):
            for instance in dataset.get_data_info(index).get("instances", ()):
                labels[instance["bbox_label"], bool(instance.get("ignore_flag"))] += 1
        objects = labels.total()
        text += f"{used} of {listed.images} images and {objects} of {listed.annotations} objects"
        left_out, filled = _left_out(dataset, listed, objects), listed.filled
        if isinstance(dataset.pipeline, CheckedPipeline):
            counted = {label: n for (label, ignored), n in labels.items() if not ignored}
            dataset.pipeline.label_counts = Counter(counted)
    else:
        text += f"{used} images"
        if not dataset.ann_file and not getattr(dataset, "backend_args", None):
            count, named = _other_files(dataset)
            left_out = {f"other files in their folders{named}": count}
    text += f" are used{_joined('; left out: ', left_out)}{_joined('; filled in: ', filled)}"
    unusual = any(left_out.values()) or bool(filled)
    print_log(text, logger="current", level=logging.WARNING if unusual else logging.INFO)


def _left_out(dataset: BaseDataset, listed: Listed, objects: int) -> dict[str, int]:
    """What a data set leaves out of what a COCO file lists: how much for which reason."""
    known = set(getattr(dataset, "cat_ids", None) or listed.categories)
    names = listed.categories
    others = {names[i]: n for i, n in listed.objects.items() if i in names.keys() - known}
    unlisted = {i: n for i, n in listed.objects.items() if i not in names}
    objects_of = {
        **{f"objects {reason}": count for reason, count in listed.unused.items()},
        f"objects of categories that are not in classes ({names_of(others)})": sum(others.values()),
        f"objects whose category_id ({names_of(unlisted)}) is none of the file's categories": sum(
            unlisted.values()
        ),
    }
    left_out = {
        "images (smaller than filter_cfg allows, or without an object)": listed.images
        - len(dataset),
        **objects_of,
        "objects of images that are left out": listed.annotations
        - objects
        - sum(objects_of.values()),
    }
    if any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms):
        left_out["masks without a polygon of three points, as crowds"] = listed.shapeless
    return {what: count for what, count in left_out.items() if count > 0}


def _joined(before: str, counts: dict[str, int], what: str = "") -> str:
    """Counts for a message, behind a text; nothing where there are none."""
    parts = [f"{count} {what} {name}".replace("  ", " ") for name, count in counts.items() if count]
    return before + ", ".join(parts) if parts else ""


def _other_files(dataset: BaseDataset) -> tuple[int, str]:
    """The files beyond one per image, in the folders of a data set without a list.

    The data set itself has walked through them.

    Returns:
        How many there are, and those with a suffix that the data set does not take, for a message.
    """
    folders = {Path(prefix).resolve() for prefix in dataset.data_prefix.values() if prefix}
    found = [_suffixes([folder]) for folder in folders]
    taken = getattr(dataset, "extensions", ()) or (
        f".{str(getattr(dataset, key, '')).rpartition('.')[2]}"
        for key in ("img_suffix", "seg_map_suffix")
    )
    others = sum(found, Counter())
    for suffix in taken:
        others.pop(suffix, None)
    count = sum(max(0, of_folder.total() - len(dataset)) for of_folder in found)
    return count, f" ({_listed(others)})" if others else ""


def _suffixes(folders: Iterable[Path]) -> Counter[str]:
    """How many files of each suffix are below folders."""
    names = (name for folder in folders for _, _, files in os.walk(folder) for name in files)
    return Counter(os.path.splitext(name)[1].lower() or name for name in names)


def _listed(suffixes: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))


def _local_configs(config: dict) -> Iterator[dict]:
    for dataset in unwrap(config):
        if not dataset.get("backend_args"):
            yield dataset


def _class_of(dataset: dict) -> type | None:
    """The class that a data set's config names."""
    kind = dataset.get("type")
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(dataset.get("_scope_")) as registry:
            kind = registry.get(kind)
    return kind


def classes_of(dataset: dict) -> tuple[list[str] | None, bool]:
    """The classes of a data set's config, and whether it gives them or upstream's class has them.

    None where they are known from the data alone.
    """
    metainfo = dataset.get("metainfo")
    classes = metainfo.get("classes") if isinstance(metainfo, dict) else None
    classes = classes or dataset.get("classes")
    if isinstance(classes, str):
        # A file with a name in each line.
        return (list_from_file(classes) if os.path.isfile(classes) else None), True
    default = getattr(_class_of(dataset), "METAINFO", {}).get("classes")
    return (list(classes), True) if classes else (list(default) if default else None, False)


def _reads_masks(dataset: dict) -> bool:
    steps = (step for step in dataset.get("pipeline", ()) if isinstance(step, dict))
    return any(step.get("with_mask") for step in steps)


def _annotations(dataset: dict) -> Path | None:
    """The annotation file of a data set's config, joined as mmengine joins it."""
    root, name = Path(dataset.get("data_root") or ""), str(dataset.get("ann_file") or "")
    # Where mmpretrain's ImageNet looks.
    derived = root / "meta" / f"{dataset.get('split')}.txt"
    return root / name if name else derived if derived.is_file() else None


class CheckedPipeline(Compose):
    """A data set's pipeline that names the file in every error, and counts what it leaves out.

    Raises a `DataError` for images that cannot be read or have another size than their annotations
    say, for labels of no class, and where a test, or `max_refetch` images one after the other,
    would get nothing.

    Args:
        dataset: The data set, whose pipeline is taken over.
        training: See `build_dataloader`.
    """

    def __init__(self, dataset: BaseDataset, training: bool):
        self.transforms = dataset.pipeline.transforms
        self.training = training
        self.patience = dataset.max_refetch
        self.classes = len(dataset.metainfo.get("classes") or ())
        # Only mmseg's data sets give maps whose labels are those of `classes`.
        self.ignore_index = getattr(dataset, "ignore_index", None)
        # How many objects of each label there are, where they were counted at the start.
        self.label_counts: Counter | None = None
        # Data loaders' workers add to it too.
        self.left_out = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._in_a_row = 0

    def __call__(self, data: dict) -> dict | None:
        """Applies the transforms.

        Args:
            data: The sample's paths and annotations.

        Returns:
            The sample, or None if a transform gave none.

        Raises:
            DataError: See the class.
        """
        return self._apply(self.transforms, data)

    def load_map(self, data: dict) -> np.ndarray | None:
        """The labels of a sample's pixels, (H, W), as its pipeline loads them.

        Args:
            data: The sample's paths.

        Returns:
            The labels, None if the pipeline loads none in a way that is known.

        Raises:
            DataError: See the class.
        """
        loaders = [step for step in self.transforms if type(step).__name__ == "LoadAnnotations"]
        if self.ignore_index is None or not loaders or not data.get("seg_map_path"):
            return None
        return self._apply(loaders, data)["gt_seg_map"]

    def _apply(self, transforms: Sequence[Callable], data: dict) -> dict | None:
        file = str(data.get("img_path") or f"sample {data.get('sample_idx')}")
        if data.get("seg_map_path"):
            file += f" with {data['seg_map_path']}"
        step = "its annotations"
        try:
            self._check_label(data)
            for transform in transforms:
                step = type(transform).__name__
                before = set(data)
                data = transform(data)
                if data is None:
                    self._leave_out(step)
                    return None
                self._check_loaded(data, set(data) - before, step)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except Exception as error:
            reason = f"{file} cannot be used: {step} failed with {type(error).__name__}: {error}"
            # What may be well the next time is no fault of the file: another start may go on.
            passing = isinstance(error, OSError) and error.errno not in NO_SUCH_FILE
            kind = RuntimeError if passing or isinstance(error, MemoryError) else DataError
            raise kind(reason) from error
        self._in_a_row = 0
        return data

    def _leave_out(self, step: str) -> None:
        if not self.training:
            raise DataError(f"{step} returned nothing, and a test must not skip an image.")
        self.left_out += 1
        self._in_a_row += 1
        if self._in_a_row > self.patience:
            raise DataError(
                f"this is image number {self._in_a_row} in a row for which the pipeline gives "
                f"nothing ({step})."
            )

    def _check_label(self, data: dict) -> None:
        labels = np.atleast_1d(data.get("gt_label", ()))
        if self.classes and labels.dtype.kind in "iu":
            wrong = labels[(labels < 0) | (labels >= self.classes)]
            if wrong.size:
                raise DataError(
                    f"its label {wrong[0]} is of no class: there are {self.classes}, from 0 on."
                )

    def _check_loaded(self, data: dict, new: set[str], step: str) -> None:
        if "img" in new and OPENCV_FILLS_UP and _is_cut(str(data.get("img_path"))):
            raise DataError("the image is cut short.")
        # A video's samples are lists of all these.
        of_one_image = isinstance(data.get("img_path"), str)
        if of_one_image and "ori_shape" in new and {"height", "width", "instances"} <= data.keys():
            listed = data["height"], data["width"]
            if tuple(data["ori_shape"][:2]) != listed:
                raise DataError(
                    f"the image has {_size(data['ori_shape'])} pixels (height x width, turned as "
                    f"its EXIF data say), its annotations are for {_size(listed)}."
                )
        if "gt_seg_map" in new and self.ignore_index is not None:
            # Loaders of a user's own read files that only they know.
            self._check_map(data, whole_file=step == "LoadAnnotations")

    def _check_map(self, data: dict, whole_file: bool) -> None:
        seg_map, path = data["gt_seg_map"], data.get("seg_map_path")
        shape = data.get("ori_shape", seg_map.shape)[:2]
        if seg_map.shape != tuple(shape):
            raise DataError(
                f"its annotation {path} has {_size(seg_map.shape)} pixels, the image has "
                f"{_size(shape)}. An annotation is one channel of the image's size."
            )
        if whole_file and path and os.path.isfile(path):
            with Image.open(path) as image:
                if image.mode not in ("1", "L", "P") and np.max(image) > 255:
                    raise DataError(
                        f"its annotation {path} is of the kind {image.mode!r}, with labels up to "
                        f"{np.max(image)}; expected 8 bits per pixel, since mmseg cuts labels to "
                        "them."
                    )
        if not self.classes:
            return
        if seg_map.dtype != np.uint8:
            # Of a loader of the user's own, whose numbers are not known to be labels.
            return
        counts = cv2.calcHist([seg_map], [0], None, [256], [0, 256]).ravel()
        counts[: self.classes] = 0
        counts[self.ignore_index % 256] = 0
        if counts.any():
            labels = np.flatnonzero(counts)
            zero = " (one more in the file: reduce_zero_label)" * bool(
                data.get("reduce_zero_label")
            )
            palette = whole_file and _is_palette(path)
            raise DataError(
                f"its annotation {path} has {int(counts.sum())} pixels of no class: labels "
                f"{', '.join(map(str, labels[:8]))}{zero}. There are {self.classes} classes from 0 "
                f"on, and {self.ignore_index} for none."
                + " It is a picture with a palette, whose colours' numbers are read."
                * palette
            )


def _is_palette(path: str | None) -> bool:
    if not path or not os.path.isfile(path):
        return False
    with Image.open(path) as image:
        return image.mode == "P"


def _is_cut(path: str) -> bool:
    """Whether a JPEG on the local disk ends before its end."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        if file.read(2) != b"\xff\xd8":
            return False
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        if b"\xff\xd9" in file.read():
            return False
    try:
        # Its end mark may also stand before something else.
        with Image.open(path) as image:
            image.load()
    except OSError:
        return True
    return False


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


class LeftOutHook(Hook):
    """Logs how many images a training's pipelines have left out, in whose place others were drawn.

    Args:
        interval: Steps between two looks; each epoch's and the training's end are looked at too.
    """

    def __init__(self, interval: int = 1000):
        self.interval = interval
        self._known = 0

    def after_train_iter(self, runner, *_args, **_kwargs) -> None:
        """Looks, if it is time."""
        if self.every_n_train_iters(runner, self.interval):
            self._log(runner)

    def after_train_epoch(self, runner) -> None:
        """Looks."""
        self._log(runner)

    def after_train(self, runner) -> None:
        """Looks."""
        self._log(runner)

    def _log(self, runner) -> None:
        pipelines = [d.pipeline for d in base_datasets(runner.train_dataloader.dataset)]
        count = sum(int(p.left_out) for p in pipelines if isinstance(p, CheckedPipeline))
        if count > self._known:
            self._known = count
            runner.logger.warning(
                f"{count} times so far the pipeline returned nothing for an image, and another was "
                "drawn in its place"
            )
