"""How often each class occurs in what is trained and evaluated: objects, pixels or images.

A class that never occurs is no error, and seldom what was meant.
"""

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from mmvmamba.engine.class_names import names_of
from mmvmamba.engine.data_checks import CheckedPipeline, base_datasets
from mmvmamba.engine.errors import DataError

# Seconds that counting may take for a split; images are looked at in a random order.
MOST_SECONDS = 10
# Up to how many classes the log gives each count.
MOST_CLASSES = 200


def log_class_counts(dataset: Dataset, split: str, number: int | None) -> None:
    """Logs how often each class occurs in a split, and warns of those that do not.

    Args:
        dataset: The split's data set.
        split: 'train', 'val' or 'test'.
        number: How many classes there are, where the data set does not name them.

    Raises:
        DataError: If a label is of no class, or a map of labels cannot be used.
    """
    bases = list(base_datasets(dataset))
    until = time.monotonic() + MOST_SECONDS
    counts, seen, what = Counter(), 0, ""
    for index, base in enumerate(bases):
        # What is left of the time is shared by the data sets that are left.
        share = (until - time.monotonic()) / (len(bases) - index)
        found, looked_at, kind = count_classes(base, share, split)
        counts, seen, what = counts + found, seen + looked_at, kind or what
    if not what:
        return
    names = next((one.metainfo.get("classes") for one in bases if one.metainfo.get("classes")), ())
    names = list(names) or list(range(number or 0))
    beyond = [label for label in counts if not 0 <= label < len(names)]
    if names and beyond:
        raise DataError(
            f"the {split} data set has labels of no class: {names_of(sorted(beyond))}. There are "
            f"{len(names)} classes, from 0 on."
        )
    images = sum(map(len, bases))
    absent = absent_classes(names, counts, bases)
    text = f"{split}: {what} per class"
    if seen < images:
        text += f" in {seen} of {images} images, drawn at random"
    if len(names) <= MOST_CLASSES:
        text += ": " + ", ".join(f"{name} {counts[i]}" for i, name in enumerate(names))
    else:
        least, most = min(counts.values(), default=0), max(counts.values(), default=0)
        text += f": {len(names)} classes, {0 if absent else least} to {most} each"
    if absent:
        text += f". {absent}"
    print_log(text, logger="current", level=logging.WARNING if absent else logging.INFO)


def absent_classes(names: Sequence, counts: Counter, datasets: list[BaseDataset]) -> str:
    """Says which classes never occur, and why if that can be known; '' if all do."""
    none = [name for label, name in enumerate(names) if not counts[label]]
    return f"Classes that never occur: {names_of(none)}.{_why(datasets)}" if none else ""


def count_classes(
    dataset: BaseDataset, seconds: float, split: str = ""
) -> tuple[Counter, int, str]:
    """Counts how often each label occurs in a data set.

    Args:
        dataset: The data set, without wrappers.
        seconds: How long it may take.
        split: For the progress bar.

    Returns:
        The counts by label, how many images were looked at, and what was counted: 'objects',
        'pixels' or 'images'; '' if it is not known how.

    Raises:
        DataError: If a map of labels cannot be used.
    """
    pipeline = dataset.pipeline
    counted = getattr(pipeline, "label_counts", None)
    if counted is not None:
        return counted, len(dataset), "objects"
    if hasattr(dataset, "get_len_per_video") or not len(dataset):
        return Counter(), 0, ""
    counts, what = Counter(), ""
    seen = 0
    for info in _drawn(dataset, seconds, split):
        if "instances" in info and not hasattr(dataset, "ignore_index"):
            what = "objects"
            instances = info["instances"]
            counts.update(o["bbox_label"] for o in instances if not o.get("ignore_flag"))
        elif "gt_label" in info:
            what = "images"
            counts.update(np.atleast_1d(info["gt_label"]).tolist())
        else:
            labels = pipeline.load_map(info) if isinstance(pipeline, CheckedPipeline) else None
            if labels is None:
                break
            what = "pixels"
            found = np.bincount(labels.ravel())
            present = (int(label) for label in np.flatnonzero(found))
            counts.update({i: int(found[i]) for i in present if i != dataset.ignore_index})
        seen += 1
    return counts, seen, what


def _drawn(dataset: BaseDataset, seconds: float, split: str) -> Iterator[dict]:
    """Yields what a data set knows of its images, in a random order, as long as time allows."""
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    end = time.monotonic() + seconds
    description = f"counting the {split} classes ({MOST_SECONDS} s at most)"
    console = Console(stderr=True)
    for index in track(order, description, console=console, transient=True):
        yield dataset.get_data_info(index)
        if time.monotonic() > end:
            return


def _why(datasets: list[BaseDataset]) -> str:
    """Why classes may be missing from maps of labels: what the files themselves hold."""
    values, palette, reduced = set(), False, False
    for dataset in datasets:
        if not hasattr(dataset, "ignore_index"):
            continue
        reduced |= any(
            getattr(step, "reduce_zero_label", False) for step in dataset.pipeline.transforms
        )
        for index in range(min(len(dataset), 10)):
            path = dataset.get_data_info(index).get("seg_map_path")
            if path and os.path.isfile(path):
                with Image.open(path) as image:
                    palette |= image.mode == "P"
                    values |= set(np.unique(np.asarray(image)).tolist())
    reasons = []
    if values <= {0, 255} and 255 in values:
        reasons.append(
            "the maps hold 0 and 255 alone, and 255 stands for no class: write 1 for the second "
            "class instead of 255"
        )
    if reduced and 0 in values:
        reasons.append(
            "reduce_zero_label=True takes 0 for no class and lowers the other labels by one: set "
            "it to False in the data set and in LoadAnnotations if 0 is a class"
        )
    if palette:
        reasons.append(
            "maps are pictures with a palette, whose colours' numbers are the labels: "
            f"{names_of(sorted(values))}"
        )
    return "".join(f" Why: {reason}." for reason in reasons)
