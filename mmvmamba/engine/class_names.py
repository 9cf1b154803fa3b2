"""Labels by name: a data set's label i means `classes[i]`, whatever order its files have.

mmdet numbers the categories of a COCO file in the file's order and mmpretrain folders by the
alphabet, whatever `classes` says: with another order there, dogs are taught as horses. And
pycocotools reports on categories in the order of their ids. What is replaced here is upstream's
numbering alone.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from mmvmamba.engine.coco_file import complete
from mmvmamba.engine.errors import DataError

# How many names a message lists.
MOST = 20


def names_of(names: Iterable[object]) -> str:
    """Names for a message, the first of them if there are many."""
    names = [f"{name!r}" for name in names]
    more = len(names) - MOST
    return ", ".join(names[:MOST]) + (f", ... ({more} more)" if more > 0 else "") or "none"


def check_class_names(dataset: dict) -> None:
    """Refuses `classes` of a data set's config that are no list of different names.

    Raises:
        DataError: If they are not.
    """
    metainfo = dataset.get("metainfo")
    inner = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
    for classes in (inner, dataset.get("classes")):
        if isinstance(classes, str):
            # Upstream takes it for a file with a name in each line.
            if "://" not in classes and not Path(classes).expanduser().is_file():
                raise DataError(
                    f"classes is the text {classes!r}, which is no list of names and no file with "
                    f"one in each line. A tuple of one name needs a comma: classes = ({classes!r},)"
                )
        elif classes is not None:
            twice = [name for name, count in Counter(classes).items() if count > 1]
            if twice:
                raise DataError(f"classes has {names_of(twice)} more than once: {list(classes)}.")


def check_categories(categories: Mapping[int, str], classes: Sequence[str], given: bool) -> None:
    """Compares the categories of a COCO file with the classes of its data set.

    Args:
        categories: The names of the file's categories, by id.
        classes: The data set's classes.
        given: Whether the config gives them. The names that upstream gives COCO's own data may be
            more than a file has, as long as it has one of them.

    Raises:
        DataError: If the file does not have a class, or has one twice.
    """
    names = Counter(categories.values())
    missing = [name for name in classes if name not in names]
    if missing and (given or len(missing) == len(classes)):
        raise DataError(
            f"the file has no category {names_of(missing)}{near_name(missing[0], names)}. Its "
            f"categories: {names_of(names)}; the config's classes: {names_of(classes)}. Set "
            "classes (metainfo=dict(classes=[...])) to the file's names, and num_classes to their "
            "number."
        )
    twice = [name for name in classes if names[name] > 1]
    if twice:
        raise DataError(
            f"the file has more than one category named {names_of(twice)}: give all their "
            "annotations one category_id, and leave the other categories out."
        )


def _ids_of(classes: Sequence[str], categories: dict[int, dict]) -> list[int]:
    """The ids of a COCO file's categories in the order of `classes`.

    Args:
        classes: The classes.
        categories: The file's categories by id, to which a class that is not among them is added.
    """
    ids = {category["name"]: number for number, category in categories.items()}
    for label, name in enumerate(classes):
        if name not in ids:
            ids[name] = -1 - label
            categories[ids[name]] = {"id": ids[name], "name": name}
    return [ids[name] for name in classes]


def near_name(name: object, names: Iterable[str]) -> str:
    """The name that may be meant, for a message."""
    lower = {str(one).lower(): one for one in names}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1)
    return f" (did you mean {lower[near[0]]!r}?)" if near else ""


def number_coco_by_name() -> None:
    """Lets mmdet's data sets and metrics number the categories of COCO files by `classes`.

    Both read files through mmdet's `COCO`, which also completes what has a safe default from here
    on: see `mmvmamba.engine.coco_file.complete`.
    """
    from mmdet.datasets.api_wrappers import COCO
    from mmdet.evaluation.metrics import coco_metric

    if hasattr(COCO, "numbers_by_name"):
        return
    create_index, get_cat_ids = COCO.createIndex, COCO.get_cat_ids

    def index_completed(self) -> None:
        complete(self.dataset)
        create_index(self)

    def ids_by_name(self, cat_names=(), sup_names=(), cat_ids=()) -> list[int]:
        if not cat_names or sup_names or cat_ids:
            return get_cat_ids(self, cat_names, sup_names, cat_ids)
        names = [cat_names] if isinstance(cat_names, str) else cat_names
        return _ids_of(names, self.cats)

    COCO.createIndex, COCO.get_cat_ids, COCO.numbers_by_name = index_completed, ids_by_name, True
    for name in ("COCOeval", "COCOevalMP"):
        kind = getattr(coco_metric, name)
        setattr(coco_metric, name, type(name, (_InTheOrderAskedFor, kind), {}))


class _InTheOrderAskedFor:
    """pycocotools' evaluation, whose results per category are in the order of `params.catIds`.

    It sorts them by id, and mmdet takes the first result for the first class.
    """

    def evaluate(self) -> None:
        self._asked_for = list(self.params.catIds)
        super().evaluate()

    def accumulate(self, p=None) -> None:
        super().accumulate(p)
        if not self.params.useCats:
            return
        ids = list(self.params.catIds)
        order = [ids.index(one) for one in self._asked_for]
        for result, axis in (("precision", 2), ("scores", 2), ("recall", 1)):
            self.eval[result] = self.eval[result].take(order, axis)


def number_folders_by_name() -> None:
    """Lets mmpretrain number the folders of classes by `classes`, and pass over hidden ones."""
    from mmpretrain.datasets import custom

    if hasattr(custom, "numbers_by_name"):
        return
    find_samples, find_folders = custom.CustomDataset._find_samples, custom.find_folders

    def visible_folders(root: str, backend=None) -> tuple[list[str], dict[str, int]]:
        folders = [name for name in find_folders(root, backend)[0] if not name.startswith(".")]
        return folders, {name: label for label, name in enumerate(folders)}

    def find_by_name(self) -> list:
        if not self.with_label:
            return find_samples(self)
        folders, _ = visible_folders(self.img_prefix)
        classes = self.CLASSES
        # ImageNet's own names are not those of its folders, which are in the alphabet's order.
        if classes is not None and classes != type(self).METAINFO.get("classes"):
            _check_folders(self.img_prefix, folders, classes)
            folders = list(classes)
        samples = find_samples(self)
        by_name = {name: label for label, name in enumerate(folders)}
        label_of = {label: by_name[name] for name, label in self.folder_to_idx.items()}
        self.folder_to_idx = by_name
        return [
            (path, label_of[label])
            for path, label in samples
            if not any(part.startswith(".") for part in PurePath(path).parts)
        ]

    custom.find_folders, custom.CustomDataset._find_samples = visible_folders, find_by_name
    custom.numbers_by_name = True


def _check_folders(root: str, folders: list[str], classes: Sequence[str]) -> None:
    without = [name for name in classes if name not in folders]
    unknown = [name for name in folders if name not in classes]
    if without or unknown:
        near = near_name(without[0], unknown) if without else ""
        raise DataError(
            f"the folders in {root} are not those of classes. Classes without a folder: "
            f"{names_of(without)}{near}; folders of no class: {names_of(unknown)}. The folders: "
            f"{names_of(folders)}; the config's classes: {names_of(classes)}. A class without "
            "images needs an empty folder."
        )
