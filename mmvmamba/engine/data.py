"""Where a config's data sets are: pointing them elsewhere, and checking that they are there.

Paths are joined as mmengine's `BaseDataset` joins them: `ann_file` and each `data_prefix` below
`data_root`, unless absolute.
"""

from collections.abc import Iterator
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
        str(dataset["data_root"]).rstrip("/")
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
        if isinstance(value, str) and (value.rstrip("/") == old or value.startswith(old + "/")):
            return new + value[len(old) :]
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
        else:
            changed = change(value)
            if changed is not value:
                node[key] = changed


def find_data(cfg: Config, project: Path) -> str | None:
    """Lets a config's relative data root be found from any working directory.

    Args:
        cfg: The config, changed in place if its root is not below the working directory but is
            below the project.
        project: The checkout's folder.

    Returns:
        The root that is used instead, or None if nothing was changed.
    """
    roots = {str(dataset.get("data_root") or "") for _, dataset in datasets_of(cfg)}
    if len(roots) != 1:
        return None
    root = Path(roots.pop())
    if root.is_absolute() or not root.parts or root.exists() or not (project / root).exists():
        return None
    set_data_root(cfg, str(project / root))
    return str(project / root)


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
