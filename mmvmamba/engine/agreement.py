"""Whether a config, its data, its model and its metrics agree, asked before the first step.

Upstream's parts each believe their own settings: a head of 80 classes trains on three, a validation
may number classes otherwise than the training did, and a metric may read another file than the data
set. What does not agree is refused in one message with both sides. A config that means it names the
check in `accepted_disagreements`, e.g. `accepted_disagreements=["class_count"]`.
"""

import filecmp
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.utils.data import DataLoader, Dataset

from mmvmamba.engine.class_counts import log_class_counts
from mmvmamba.engine.class_names import names_of
from mmvmamba.engine.coco_file import has_outline
from mmvmamba.engine.data import SPLITS, datasets_of, evaluators_of
from mmvmamba.engine.data_checks import base_datasets, classes_of
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.wrappers import unwrapped

ACCEPTED = "accepted_disagreements"
CLASSES, COUNT, METRICS = "class_names", "class_count", "metrics"
# Modules whose classes are not the data set's: proposals, boundaries, identities, other tasks'.
OTHER_CLASSES = re.compile(
    r"(^|\.)(rpn_head|backbone|text_encoder|language_model|reid|target_generator|task_heads)(\.|$)"
    r"|(^|\.)semantic_head(\.|$)"
)


class DisagreementError(UsageError):
    """Raised when two parts of a config do not agree.

    Args:
        kind: The check's name.
        message: Both sides, and what to change.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f'{message}\n  If it is meant: {ACCEPTED}=["{kind}"] in the config.')


class AgreementHook(Hook):
    """Compares the parts of a run before its first step, and counts the classes of its data."""

    def before_run(self, runner) -> None:
        """Compares, and counts.

        Raises:
            UsageError: If parts do not agree.
        """
        for check in checks(runner):
            check()
        if is_main_process():
            for split, loop in _built_loops(runner).items():
                dataset = loop.dataloader.dataset
                log_class_counts(dataset, split, class_number(unwrapped(runner.model), dataset))

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compares a checkpoint's class names with those of the data it goes on with.

        Raises:
            UsageError: If they differ. A training that only begins with its weights may.
        """
        training = isinstance(runner._train_loop, BaseLoop)
        if CLASSES in (runner.cfg.get(ACCEPTED) or ()) or (training and not runner._resume):
            return
        for split, loop in _built_loops(runner).items():
            if (split == "train") == training:
                check_checkpoint_names(checkpoint, loop.dataloader.dataset, split)


def checks(runner) -> Iterator[Callable[[], None]]:
    """Yields what is compared of a runner whose loops are built, each raising a `UsageError`."""
    cfg, model, loops = runner.cfg, unwrapped(runner.model), _built_loops(runner)
    accepted = cfg.get(ACCEPTED) or ()
    yield partial(check_configured_names, cfg)
    if CLASSES not in accepted:
        yield partial(check_same_names, {s: loop.dataloader.dataset for s, loop in loops.items()})
    for split, loop in loops.items():
        dataset, evaluator = loop.dataloader.dataset, getattr(loop, "evaluator", None)
        metrics = evaluator.metrics if isinstance(evaluator, Evaluator) else []
        if COUNT not in accepted:
            yield partial(check_class_count, model, dataset, split)
            yield partial(check_ignored_label, model, dataset, metrics, split)
            yield partial(check_best_of, model, metrics, class_number(model, dataset), split)
        if METRICS not in accepted and metrics:
            yield partial(check_evaluators_files, cfg, split)
            several = type(evaluator).__name__ == "MultiDatasetsEvaluator"
            sets = dataset.datasets if several else [dataset] * len(metrics)
            for metric, one in zip(metrics, sets, strict=False):
                yield partial(check_annotation_file, metric, one, split)
        if split == "train":
            yield partial(check_batch_norm, model, loop.dataloader)


def _built_loops(runner) -> dict[str, BaseLoop]:
    """A runner's loops that are built and have one data loader, by split."""
    loops = {split: getattr(runner, f"_{split}_loop") for split in SPLITS}
    return {
        split: loop
        for split, loop in loops.items()
        if isinstance(loop, BaseLoop) and isinstance(getattr(loop, "dataloader", 0), DataLoader)
    }


def check_model_and_data(
    cfg: Config, model: nn.Module, dataset: Dataset, checkpoint: dict, split: str = "test"
) -> None:
    """Compares what a tool that draws predictions uses, as a test does.

    Raises:
        UsageError: If parts do not agree.
    """
    accepted = cfg.get(ACCEPTED) or ()
    check_configured_names(cfg)
    if CLASSES not in accepted:
        check_checkpoint_names(checkpoint, dataset, split)
    if COUNT not in accepted:
        check_class_count(model, dataset, split)


# Names.


def class_names(dataset: Dataset) -> list[list[str]]:
    """The classes of each data set inside of wrappers, of those that have any."""
    found = [one.metainfo.get("classes") for one in base_datasets(dataset)]
    return [list(classes) for classes in found if classes]


def check_configured_names(cfg: Config) -> None:
    """Compares the `classes` that a config gives its data sets.

    A split that is not built, such as the test's in a training, is compared here alone.

    Raises:
        DisagreementError: If they differ.
    """
    if CLASSES in (cfg.get(ACCEPTED) or ()):
        return
    first = None
    for split, dataset in datasets_of(cfg):
        classes, _ = classes_of(dataset)
        if not classes:
            continue
        if first is None:
            first = split, classes
        _compare_names(*first, split, classes)


def check_same_names(datasets: dict[str, Dataset]) -> None:
    """Compares the classes of built data sets.

    Args:
        datasets: The data sets by split.

    Raises:
        DisagreementError: If they differ.
    """
    found = [(split, names) for split, one in datasets.items() for names in class_names(one)]
    for split, names in found[1:]:
        _compare_names(*found[0], split, names)


def _compare_names(split: str, names: list[str], other: str, others: list[str]) -> None:
    if names == others:
        return
    where = f"the {split} and the {other} data set" if other != split else f"the {split} data sets"
    raise DisagreementError(
        CLASSES,
        f"{where} have different classes{_difference(names, others)}.\n  {split}: "
        f"{names_of(names)}\n  {other}: {names_of(others)}\n  Give all of them the same classes in "
        "the same order: metainfo=dict(classes=[...]), or folders of the same names.",
    )


def _difference(names: list[str], others: list[str]) -> str:
    if sorted(map(str, names)) == sorted(map(str, others)):
        return ", in another order"
    ours = [name for name in names if name not in others]
    theirs = [name for name in others if name not in names]
    return f" ({names_of(ours)} on one side alone, {names_of(theirs)} on the other)"


def check_checkpoint_names(checkpoint: dict, dataset: Dataset, split: str) -> None:
    """Compares the classes that a checkpoint was trained with with a data set's.

    Official files name none.

    Raises:
        DisagreementError: If they differ.
    """
    meta = checkpoint.get("meta")
    meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
    # A training on several data sets notes those of each.
    meta = meta[0] if isinstance(meta, list | tuple) and meta else meta
    trained = meta.get("classes") if isinstance(meta, dict) else None
    for names in class_names(dataset) if trained else ():
        if list(trained) != names:
            raise DisagreementError(
                CLASSES,
                f"the checkpoint was trained with other classes than the {split} data set has"
                f"{_difference(list(trained), names)}.\n  checkpoint: {names_of(trained)}\n  "
                f"{split}: {names_of(names)}\n  Take the config that the checkpoint was trained "
                "with, or give the data set the checkpoint's classes.",
            )


# Numbers.


def class_heads(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Yields the parts of a model that are made for a number of classes.

    Those whose classes are not the data set's are left out: region proposals, class-agnostic masks,
    boundaries, backbones.

    Args:
        model: The model, without wrappers.

    Yields:
        The part's place in the config, its class, and its number of classes.
    """
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        if (
            not isinstance(number, int)
            or number <= 0
            or OTHER_CLASSES.search(name)
            or "RPN" in type(module).__name__
            or getattr(module, "class_agnostic", False)
            # Of boundaries, in mmseg's STDC.
            or hasattr(module, "boundary_threshold")
            or not name
            or hasattr(model, "language_model")
        ):
            continue
        place = re.sub(r"\.(\d+)", r"[\1]", f"model.{name}")
        if name == "data_preprocessor" and type(module).__module__.startswith("mmpretrain."):
            # As its configs have it.
            place = name
        key = "num_classes"
        if hasattr(module, "num_things_classes") and "mmdet" in type(module).__module__:
            key = "num_things_classes + num_stuff_classes"
        yield f"{place}.{key}", type(module).__name__, number


def class_number(model: nn.Module, dataset: Dataset) -> int | None:
    """How many classes there are: the data set's, or the model's where it has none."""
    names = class_names(dataset)
    if names:
        return len(names[0])
    return next((number for _, _, number in class_heads(model)), None)


def check_class_count(model: nn.Module, dataset: Dataset, split: str) -> None:
    """Compares the model's numbers of classes with a data set's.

    Args:
        model: The model, without wrappers.
        dataset: The data set.
        split: Whose it is.

    Raises:
        DisagreementError: If they differ, or a softmax is over one class.
    """
    check_softmax(model)
    names = class_names(dataset)
    if not names:
        return
    (meta, *_) = (one.metainfo for one in base_datasets(dataset))
    wrong = []
    for place, kind, number in class_heads(model):
        expected = len(names[0])
        if "roi_head." in place and meta.get("thing_classes"):
            expected = len(meta["thing_classes"])
        if number != expected:
            wrong.append((place, kind, number, expected))
    if wrong:
        lines = "".join(f"\n  {place} ({kind}): {number}" for place, kind, number, _ in wrong)
        number = wrong[0][3]
        raise DisagreementError(
            COUNT,
            f"the model's numbers of classes are not the data set's:{lines}\n  {split}_dataloader."
            f"dataset, classes: {number} ({names_of(names[0])})\n  Set the first to {number}, or "
            "correct the data set's classes (metainfo=dict(classes=[...])).",
        )
    check_class_weights(model, len(names[0]))


def check_class_weights(model: nn.Module, number: int) -> None:
    """Compares the lengths of losses' class weights with a number of classes.

    Raises:
        DisagreementError: If one is neither that long nor one longer, for the background.
    """
    for name, module in model.named_modules():
        weights = getattr(module, "class_weight", None)
        if not isinstance(weights, list | tuple) or OTHER_CLASSES.search(name):
            continue
        if len(weights) not in (number, number + 1):
            raise DisagreementError(
                COUNT, f"model.{name}.class_weight has {len(weights)} numbers for {number} classes."
            )


def check_softmax(model: nn.Module) -> None:
    """Refuses a softmax over one class, whose loss is 0 whatever the model says.

    Raises:
        DisagreementError: If there is one.
    """
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "BaseDecodeHead" in kinds:
            outputs, loss = module.out_channels, getattr(module, "loss_decode", None)
            remedy = (
                f"two classes, the background being one: model.{name}.num_classes=2 with maps of 0 "
                f"and 1; or a sigmoid: out_channels=1, num_classes=2, threshold=0.5 and "
                "loss_decode=dict(use_sigmoid=True, ...)"
            )
        elif "ClsHead" in kinds and "MultiLabelClsHead" not in kinds:
            outputs, loss = getattr(module, "num_classes", None), module.loss_module
            remedy = f"two classes, model.{name}.num_classes=2, one being none of the other"
        else:
            continue
        losses = loss if isinstance(loss, nn.ModuleList) else [loss]
        # mmpretrain's LabelSmoothLoss has the other inside.
        losses = [getattr(one, "ce", one) for one in losses]
        if outputs == 1 and any(getattr(one, "use_sigmoid", None) is False for one in losses):
            raise DisagreementError(
                COUNT,
                f"model.{name} ({type(module).__name__}) has one class under a softmax, whose "
                f"result is always 1 and whose loss is always 0. Take {remedy}.",
            )


def check_ignored_label(
    model: nn.Module, dataset: Dataset, metrics: list[BaseMetric], split: str
) -> None:
    """Compares the labels for "no class" of a segmentation's parts.

    Raises:
        DisagreementError: If they differ.
    """
    labels = {getattr(one, "ignore_index", None) for one in base_datasets(dataset)} - {None}
    if not labels:
        return
    expected = labels.pop()
    found = [(f"another {split} data set's ignore_index", label) for label in labels]
    for name, module in model.named_modules():
        label = getattr(module, "ignore_index", None)
        if isinstance(label, int) and not type(module).__module__.startswith("torch."):
            found.append((f"model.{name}.ignore_index", label))
    pad = getattr(getattr(model, "data_preprocessor", None), "seg_pad_val", None)
    if isinstance(pad, int):
        found.append(("model.data_preprocessor.seg_pad_val", pad))
    for metric in metrics:
        label = getattr(metric, "ignore_index", None)
        if isinstance(label, int):
            found.append((f"{split}_evaluator.ignore_index ({type(metric).__name__})", label))
    wrong = [f"\n  {place}: {label}" for place, label in found if label != expected]
    if wrong:
        raise DisagreementError(
            COUNT,
            f'the label for "no class" is not everywhere the same.{"".join(wrong)}\n  '
            f"{split}_dataloader.dataset.ignore_index: {expected}",
        )


def check_best_of(
    model: nn.Module, metrics: list[BaseMetric], number: int | None, split: str
) -> None:
    """Refuses accuracies of the best k of fewer classes, and metrics of another number of them.

    Raises:
        DisagreementError: If there is one.
    """
    if number is None:
        return
    asked = [
        (f"{split}_evaluator.topk", metric.topk)
        for metric in metrics
        if type(metric).__name__ in ("Accuracy", "MultiLabelMetric", "VOCMultiLabelMetric")
    ]
    head = getattr(model, "head", None)
    if getattr(head, "cal_acc", False) or "MultiLabel" in type(head).__name__:
        asked.append(("model.head.topk", getattr(head, "topk", None)))
    for place, best in asked:
        most = max(best) if isinstance(best, list | tuple) else best
        if isinstance(most, int) and most > number:
            fitting = "(1,)" if isinstance(best, list | tuple) else number
            raise DisagreementError(
                COUNT,
                f"{place}={best} asks for the best {most} of {number} classes. Set {place}="
                f"{fitting}"
                + (f', e.g. --cfg-options "{place}=(1,)"' if fitting == "(1,)" else "")
                + ".",
            )
    for metric in metrics:
        other = getattr(metric, "num_classes", None)
        ours = type(metric).__module__.startswith("mmpretrain.")
        if ours and isinstance(other, int) and other != number:
            raise DisagreementError(
                COUNT,
                f"{split}_evaluator.num_classes ({type(metric).__name__}) is {other}, the data set "
                f"has {number} classes.",
            )


# Metrics.


def check_annotation_file(metric: BaseMetric, dataset: Dataset, split: str) -> None:
    """Refuses a metric that reads other annotations than the data set's, or ones that it cannot.

    Args:
        metric: A metric. Those that read no COCO file are fine.
        dataset: The data set.
        split: Whose they are.

    Raises:
        DisagreementError: If it reads another file.
        UsageError: If it evaluates masks, and an object has none.
    """
    api = getattr(metric, "_coco_api", None)
    if api is None or "Panoptic" in type(metric).__name__:
        return
    for annotation in api.anns.values() if "segm" in getattr(metric, "metrics", ()) else ():
        if not has_outline(annotation):
            raise UsageError(
                f"{split}_evaluator evaluates masks (metric='segm'), and annotation "
                f"{annotation['id']} of image {annotation['image_id']} has no mask of three points "
                "or more. Add one (segmentation), remove the annotation, or evaluate boxes only: "
                f"{split}_evaluator.metric=bbox."
            )
    datasets = list(base_datasets(dataset))
    for one in datasets:
        if hasattr(one, "get_len_per_video"):
            continue
        infos = (one.get_data_info(index) for index in range(len(one)))
        used = {info.get("img_id"): Path(str(info.get("img_path"))).name for info in infos}
        read = {i: Path(str(image.get("file_name"))).name for i, image in api.imgs.items()}
        other = next((i for i, name in used.items() if read.get(i) != name), None)
        if other is not None:
            raise DisagreementError(
                METRICS,
                f"{split}_evaluator reads another annotation file than the {split} data set "
                f"({one.ann_file}): image {other!r} is {used[other]} there, and "
                f"{read.get(other, 'not in the file')} for the evaluator. Set {split}_evaluator."
                "ann_file to the data set's file.",
            )
        if len(datasets) == 1 and len(used) < len(read):
            print_log(
                f"the {split} data set gives {len(used)} images, {split}_evaluator counts all "
                f"{len(read)} of its file: objects of the other images count as missed. Set "
                "test_mode=True, leave out filter_cfg and indices, or give the evaluator a file "
                "of these images.",
                logger="current",
                level=logging.WARNING,
            )


def check_evaluators_files(cfg: Config, split: str) -> None:
    """Refuses evaluators whose annotation file is not that of a split's one data set.

    Raises:
        DisagreementError: If one has another, of other content.
    """
    files = {
        Path(str(one.get("data_root") or ""), str(one["ann_file"])).expanduser()
        for _, one in datasets_of(cfg, (split,))
        if one.get("ann_file") and not one.get("backend_args")
    }
    for evaluator in evaluators_of(cfg, split) if len(files) == 1 else ():
        name = evaluator.get("ann_file")
        if not name or "://" in name:
            continue
        (expected,) = files
        found = Path(name).expanduser()
        if not (found.is_file() and expected.is_file()) or found.samefile(expected):
            continue
        if not filecmp.cmp(found, expected, shallow=False):
            raise DisagreementError(
                METRICS,
                f"{split}_evaluator.ann_file is not the {split} data set's file.\n  evaluator: "
                f"{found}\n  data set: {expected}\n  Set {split}_evaluator.ann_file to the second.",
            )


# Steps.


def check_steps(loader: DataLoader) -> None:
    """Refuses a training whose data loader gives no batch.

    Raises:
        UsageError: If it gives none.
    """
    sampler = _sampler(loader)
    # Those without epochs never end.
    if getattr(sampler, "epoch", None) is None or len(loader) > 0:
        return
    each = f" ({len(sampler)} for each of {get_world_size()} processes)" * (get_world_size() > 1)
    raise UsageError(
        f"the training would not take one step: its data set has {len(loader.dataset)} images{each}"
        f", train_dataloader.batch_size is {loader.batch_size}, and drop_last leaves out a batch "
        f"that is not full. Set train_dataloader.batch_size to {max(1, len(sampler))} or less, or "
        "train_dataloader.drop_last=False."
    )


def check_batch_norm(model: nn.Module, loader: DataLoader) -> None:
    """Refuses single images for batch norms over pooled maps of one pixel.

    They would have one value per channel, whose deviation is 0.

    Raises:
        UsageError: If there are such norms and such batches.
    """
    sampler = _sampler(loader)
    size = loader.batch_size
    last = len(sampler) % size if size and getattr(sampler, "epoch", None) is not None else 0
    drop_last = getattr(getattr(loader.batch_sampler, "batches", loader), "drop_last", False)
    if size != 1 and (last != 1 or drop_last):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and (norm := _pooled_norm(module)):
            if isinstance(norm, SyncBatchNorm) and get_world_size() > 1:
                continue
            what = (
                "train_dataloader.batch_size is 1"
                if size == 1
                else f"the last batch of an epoch has one image ({len(sampler)} images, "
                f"train_dataloader.batch_size={size})"
            )
            raise UsageError(_single_value(f"model.{name} normalises", what))


@contextmanager
def naming_single_values() -> Iterator[None]:
    """Names the remedies where a batch norm finds one value per channel in a training step.

    Raises:
        UsageError: Instead of PyTorch's error.
    """
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UsageError(_single_value("the model normalises", str(error))) from error


def _single_value(where: str, why: str) -> str:
    return (
        f"{where} maps that are pooled to one pixel over the batch (BN), and {why}: one value per "
        "channel has no variance. Set train_dataloader.batch_size to 2 or more, or "
        "train_dataloader.drop_last=True if only the last batch is too small; train on several "
        "GPUs with norm_cfg=dict(type='SyncBN'); or use a norm of single images in the heads: "
        "norm_cfg=dict(type='GN', num_groups=32)."
    )


def _pooled_norm(steps: nn.Sequential) -> nn.Module | None:
    """The batch norm behind a pooling to one pixel, if there is one."""
    pooled = False
    for step in steps:
        if isinstance(step, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            pooled = step.output_size in (1, (1, 1), [1, 1])
        elif pooled:
            for module in step.modules():
                if isinstance(module, _BatchNorm) and module.training:
                    return module
    return None


def _sampler(loader: DataLoader) -> object:
    """The sampler inside of what knows positions."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return getattr(sampler, "sampler", sampler)
