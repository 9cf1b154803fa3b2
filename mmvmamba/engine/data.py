"""Where a config's data sets are: pointing them elsewhere, and checking that they are there.

Paths are joined as mmengine's `BaseDataset` joins them: `ann_file` and each `data_prefix` below
`data_root`, unless absolute.
"""

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config

from mmvmamba.engine.errors import UsageError

SPLITS = ("train", "val", "test")
SAMPLE_COMMAND = "python tools/dataset_tools/make_sample_data.py"


def datasets_of(cfg: Config, splits: tuple[str, ...] = SPLITS) -> Iterator[tuple[str, dict]]:
    """Yields each split's data set configs, those inside wrappers (RepeatDataset, ...) included."""
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader:
            for dataset in unwrap(loader.get("dataset")):
                yield split, dataset


def unwrap(dataset: dict | list | tuple | None) -> Iterator[dict]:
    """Yields the data set configs inside of a config's wrappers, or the config itself."""
    if isinstance(dataset, list | tuple):
        for one in dataset:
            yield from unwrap(one)
    elif isinstance(dataset, dict):
        inner = [dataset[key] for key in ("dataset", "datasets") if dataset.get(key)]
        if inner:
            yield from unwrap(inner)
        else:
            yield dataset


def with_home(config: dict) -> dict:
    """A data set's config whose paths do not begin with `~`.

    Args:
        config: The config, which stays as it is.
    """
    if isinstance(config, dict):
        config = deepcopy(config)
        _replace(config, _expanded)
    return config


def expand_home(cfg: Config) -> None:
    """Replaces `~` at the beginning of paths of data, weights and results, in place."""
    for split in SPLITS:
        for part in ("dataloader", "evaluator"):
            _replace(cfg.get(f"{split}_{part}"), _expanded)
    for key in ("data_root", "load_from", "work_dir"):
        if isinstance(cfg.get(key), str):
            cfg[key] = _expanded(cfg[key])


def _expanded(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def join_evaluators_files(cfg: Config) -> None:
    """Joins an evaluator's `ann_file` with the data root where it is the data set's, in place.

    A data set's is joined by upstream, an evaluator's is written out in the config: without the
    root, or with a root whose last slash is forgotten, it would name another file.
    """
    for split in SPLITS:
        for evaluator in evaluators_of(cfg, split):
            for _, dataset in datasets_of(cfg, (split,)):
                root, name = (str(dataset.get(key) or "") for key in ("data_root", "ann_file"))
                found = str(evaluator.get("ann_file") or "")
                if name and found in (name, root + name) and not Path(found).exists():
                    evaluator["ann_file"] = os.path.join(root, name)


def evaluators_of(cfg: Config, split: str) -> list[dict]:
    """The configs of a split's metrics."""
    evaluators = cfg.get(f"{split}_evaluator") or ()
    evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
    inner = [one.get("metrics") or one for one in evaluators if isinstance(one, dict)]
    return [one for some in inner for one in (some if isinstance(some, list | tuple) else [some])]


def set_data_root(cfg: Config, root: str) -> None:
    """Points a config at another copy of its data.

    The data sets' `data_root` and every path below it (annotation files, the evaluators' too)
    change together, which editing the config's `data_root` variable from outside would not do:
    the strings made from it have been made by then.

    Args:
        cfg: The config, changed in place.
        root: The new root.

    Raises:
        UsageError: If the config's data sets have no root, or several.
    """
    roots = {
        os.path.normpath(dataset["data_root"])
        for _, dataset in datasets_of(cfg)
        if dataset.get("data_root")
    }
    if len(roots) != 1:
        raise UsageError(
            f"--data-root needs a config whose data sets share one data_root; this one has "
            f"{', '.join(sorted(roots)) or 'none'}. Set each with --cfg-options "
            "train_dataloader.dataset.data_root=... instead."
        )
    old = roots.pop()
    new = str(Path(root).expanduser())

    def moved(value):
        if isinstance(value, str) and value and "://" not in value:
            path = os.path.normpath(value)
            if path == old or path.startswith(old + "/"):
                return new + path[len(old) :] + "/" * value.endswith("/")
        return value

    for split in SPLITS:
        for part in ("dataloader", "evaluator"):
            _replace(cfg.get(f"{split}_{part}"), moved)
    if "data_root" in cfg:
        cfg.data_root = moved(cfg.data_root)


def _replace(node, change) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node or ())
    for key, value in list(items):
        if isinstance(value, dict | list):
            _replace(value, change)
        elif isinstance(value, tuple):
            parts = list(value)
            _replace(parts, change)
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                node[key] = tuple(parts)
        else:
            changed = change(value)
            if changed is not value:
                node[key] = changed


def find_data(cfg: Config, *places: Path) -> str | None:
    """Lets a config's relative data root be found from any working directory.

    Args:
        cfg: The config, changed in place if its root is not below the working directory but is
            below one of the places.
        *places: The checkout's folder, and the config's.

    Returns:
        The root that is used instead, or None if nothing was changed.
    """
    roots = {os.path.normpath(d.get("data_root") or "") for _, d in datasets_of(cfg)}
    if len(roots) != 1:
        return None
    root = Path(roots.pop())
    if root.is_absolute() or not root.parts or root.exists():
        return None
    for place in places:
        if (place / root).exists():
            set_data_root(cfg, str(place / root))
            return str(place / root)
    return None


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuses to start while a file or folder that the data sets name is not there.

    Files behind another storage backend than the local disk are not looked at.

    Args:
        cfg: The config.
        splits: The splits that will be used.

    Raises:
        UsageError: Naming the first path that is missing and how to get the data.
    """
    for split, dataset in datasets_of(cfg, splits):
        if dataset.get("backend_args"):
            continue
        for path in dataset_paths(dataset):
            if not path.exists():
                root = dataset.get("data_root") or path.parent
                raise UsageError(
                    f"the {split} data set ({dataset.get('type')}) is not there: {path} does not "
                    f"exist (working directory: {Path.cwd()}).\n"
                    f"  Elsewhere on this machine? Add --data-root PATH (the config has {root}).\n"
                    f"  For a small sample in the same layout: {SAMPLE_COMMAND}"
                )
    for split in splits:
        for evaluator in evaluators_of(cfg, split):
            name = str(evaluator.get("ann_file") or "")
            if not name or "://" in name or evaluator.get("backend_args") or Path(name).exists():
                continue
            of_data = [str(d["ann_file"]) for _, d in datasets_of(cfg, (split,)) if "ann_file" in d]
            raise UsageError(
                f"the {split} evaluator's file is not there: {name} does not exist (working "
                f"directory: {Path.cwd()}). Set {split}_evaluator.ann_file to the data set's file "
                f"({', '.join(of_data) or 'the data set has none'}), with the data root before it."
            )


def dataset_paths(dataset: dict) -> Iterator[Path]:
    """Yields the local files and folders that a data set config names, outermost first."""
    root = str(dataset.get("data_root") or "")
    prefixes = dataset.get("data_prefix") or {}
    if isinstance(prefixes, str):
        prefixes = {"img": prefixes}
    names = [*prefixes.values(), dataset.get("ann_file"), _split_folder(dataset)]
    names = [str(name) for name in names if name]
    # A data set that names nothing below its root (CIFAR, MNIST) fetches or makes it itself.
    for name in ("", *names) if names else ():
        if "://" not in root + name and (root or name):
            yield Path(root).expanduser() / Path(name).expanduser()


def _split_folder(dataset: dict) -> str:
    """The folder that mmpretrain's ImageNet data sets derive from `split`."""
    derives = "ImageNet" in str(dataset.get("type")) and not dataset.get("data_prefix")
    return str(dataset.get("split") or "") if derives else ""
