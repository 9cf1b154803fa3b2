"""Broken data: every file is used, left out with a count, or refused by its name; nothing hangs."""

import functools
import json
import logging
import math
import random
import shutil
import uuid
from copy import deepcopy
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import TRANSFORMS, init_default_scope

pytest.importorskip("mmdet", reason="broken data are those of three tasks")
pytest.importorskip("mmseg", reason="broken data are those of three tasks")
pytest.importorskip("mmpretrain", reason="broken data are those of three tasks")

from faults import (
    DATA,
    FAULTS,
    LEFT_OUT,
    NO_POLYGON,
    REFUSED,
    USED,
    copy_of,
    imagenet_images,
)

from mmvmamba.engine import cli
from mmvmamba.engine.coco_file import _unpacked
from mmvmamba.engine.data import set_data_root
from mmvmamba.engine.data_checks import (
    CheckedPipeline,
    base_datasets,
    build_dataloader,
)
from mmvmamba.engine.errors import DataError
from mmvmamba.registry import MODELS

CONFIGS = {
    "mmdet": "configs/sample/mask-rcnn_vmamba-sample_coco.py",
    "mmseg": "configs/sample/upernet_vmamba-sample_ade20k.py",
    "mmpretrain": "configs/sample/vmamba-sample_imagenet.py",
}
SMALL = {
    "mmdet": {
        "model.neck.in_channels": [16, 32, 64, 128],
        "model.train_cfg.rpn_proposal.max_per_img": 20,
        "model.test_cfg.rpn.max_per_img": 20,
        # An untrained detector is sure of nothing, and without boxes there are no metrics.
        "model.test_cfg.rcnn.score_thr": 0.0,
        "train_dataloader.dataset.pipeline.2.scale": (96, 96),
        "val_dataloader.dataset.pipeline.1.scale": (96, 96),
    },
    "mmseg": {
        "model.decode_head.in_channels": [16, 32, 64, 128],
        "model.auxiliary_head.in_channels": 64,
        "model.data_preprocessor.size": (64, 64),
        "train_dataloader.dataset.pipeline.2.scale": (96, 72),
        "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
        "val_dataloader.dataset.pipeline.1.scale": (96, 72),
    },
    "mmpretrain": {"model.head.in_channels": 128},
}


@functools.cache
def loaded(task):
    options = {
        "model.backbone.arch.dims": 16,
        "model.backbone.arch.depths": (1, 1, 1, 1),
        "train_dataloader.batch_size": 2,
        **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")},
        **SMALL[task],
    }
    return cli.load_config_and_data(CONFIGS[task], options, "data")


def small_config(task, root):
    cfg = deepcopy(loaded(task))
    set_data_root(cfg, str(root))
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.fixture
def log():
    """The lines that are logged from here on."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    level = logger.level
    # A quiet command of another test may have made this logger.
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


def items(loader):
    """Every sample once, in order."""
    return [loader.dataset[index] for index in range(len(loader.dataset))]


# The data sets of trainings and tests, whose pipelines differ, take turns.
CASES = [
    pytest.param(task, name, ("train", "val")[number % 2], id=f"{task}-{name.replace(' ', '-')}")
    for task, faults in FAULTS.items()
    for number, name in enumerate(faults)
]


@pytest.mark.parametrize(("task", "name", "split"), CASES)
def test_each_fault(task, name, split, sample_data, tmp_path, log):
    fault = FAULTS[task][name]
    root = copy_of(sample_data, task, tmp_path)
    named = fault.apply(root, split, 1)
    config = small_config(task, root)[f"{split}_dataloader"]
    if fault.outcome == REFUSED:
        with pytest.raises(DataError) as error:
            items(build_dataloader(config, training=split == "train"))
        assert named in str(error.value)
        return
    loader = build_dataloader(config, training=split == "train")
    assert len(items(loader)) == len(loader.dataset) > 0
    line = next(line for line in reversed(log) if " are used" in line)
    assert str(root) in line
    assert ("left out: 1 " in line) == (fault.outcome == LEFT_OUT), line


def test_a_setting_that_no_loader_has_is_named(sample_data):
    config = small_config("mmpretrain", sample_data / DATA["mmpretrain"]).train_dataloader
    with pytest.raises(DataError, match=r"imagenet.*unexpected keyword argument 'batchsize'"):
        build_dataloader({**config, "batchsize": 3})


@pytest.mark.parametrize("name", NO_POLYGON)
def test_masks_without_a_polygon_are_ignored_in_training_and_counted(
    name, sample_data, tmp_path, log
):
    root = copy_of(sample_data, "mmdet", tmp_path)
    NO_POLYGON[name](root, "train", 0)
    cfg = small_config("mmdet", root)
    loader = build_dataloader(cfg.train_dataloader, training=True)
    ignored = sum(len(item["data_samples"].ignored_instances) for item in items(loader))
    crowds = sum(
        instance["ignore_flag"]
        for index in range(len(loader.dataset))
        for instance in loader.dataset.get_data_info(index)["instances"]
    )
    assert ignored == crowds + 1
    assert "left out: 1 masks without a polygon of three points" in log[-1]
    # An evaluation of masks would end with an error of pycocotools, but for odd numbers.
    file = NO_POLYGON[name](root, "val", 0)
    if name == "odd numbers":
        build_dataloader(cfg.val_dataloader)
        return
    with pytest.raises(DataError, match=f"{file}: its mask .* is no polygon of three points"):
        build_dataloader(cfg.val_dataloader)
    # One of boxes does not look at them.
    for step in cfg.val_dataloader.dataset.pipeline:
        step.pop("with_mask", None)
    build_dataloader(cfg.val_dataloader)


def test_images_without_objects_are_left_out_of_trainings_and_counted(sample_data, tmp_path, log):
    root = copy_of(sample_data, "mmdet", tmp_path)
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        gone = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
        path.write_text(json.dumps(content))
    cfg = small_config("mmdet", root)
    assert len(build_dataloader(cfg.train_dataloader, training=True).dataset) == 3
    assert "3 of 4 images and" in log[-1]
    assert "left out: 1 images (smaller than filter_cfg allows" in log[-1]
    # A test leaves nothing out.
    assert len(build_dataloader(cfg.val_dataloader).dataset) == 2
    assert "2 of 2 images" in log[-1]


@pytest.mark.parametrize("task", FAULTS)
def test_nothing_to_use_is_refused(task, sample_data, tmp_path):
    """An infinite sampler over nothing would never return."""
    root = copy_of(sample_data, task, tmp_path)
    cfg = small_config(task, root)
    if task == "mmdet":
        path = root / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "annotations": []}))
    elif task == "mmseg":
        cfg.train_dataloader.dataset.img_suffix = ".tiff"
    else:
        (root / "meta/train.txt").write_text("")
    with pytest.raises(DataError, match="nothing is left of it"):
        build_dataloader(cfg.train_dataloader)


@pytest.mark.parametrize("task", FAULTS)
def test_workers_name_the_file_too(task, sample_data, tmp_path):
    root = copy_of(sample_data, task, tmp_path)
    named = FAULTS[task]["web page"].apply(root, "train", 2)
    config = small_config(task, root).train_dataloader
    config.num_workers = 2
    loader = build_dataloader(config, seed=0)
    with pytest.raises(DataError, match=named):
        list(islice(loader, 20))


def test_a_training_ends_with_the_message_of_a_usage_error(sample_data, tmp_path, project):
    root = copy_of(sample_data, "mmseg", tmp_path)
    named = FAULTS["mmseg"]["label 151"].apply(root, "train", 0)
    name = uuid.uuid4().hex
    arguments = [
        str(project / CONFIGS["mmseg"]),
        *("--data-root", str(root), "--work-dir", str(tmp_path / "work"), "--cfg-options"),
        *("train_dataloader.num_workers=1", "train_dataloader.batch_size=4"),
        *(f"{key}={str(value).replace(' ', '')}" for key, value in SMALL["mmseg"].items()),
        *("model.backbone.arch.dims=16", "model.backbone.arch.depths=(1,1,1,1)"),
        *(f"experiment_name={name}", f"visualizer.name={name}"),
    ]
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: cli.train(cli.parse_train_arguments(arguments)))
    assert named in str(end.value)
    assert "of no class: labels 150 (one more in the file" in str(end.value)


@TRANSFORMS.register_module()
class GiveNothing:
    """Gives nothing for one of the images, or for all."""

    def __init__(self, file=""):
        self.file = file

    def __call__(self, data):
        return None if self.file in data["img_path"] else data


def test_images_drawn_anew_are_counted_across_workers(sample_data, tmp_path):
    root = copy_of(sample_data, "mmpretrain", tmp_path)
    cfg = small_config("mmpretrain", root)
    gone = imagenet_images(root, "train")[0].name
    loader = cfg.train_dataloader
    loader.dataset.pipeline.insert(0, {"type": "GiveNothing", "file": gone})
    loader.num_workers = 2
    cfg.train_cfg.max_epochs, cfg.work_dir = 3, str(tmp_path / "work")
    cfg.experiment_name = cfg.visualizer.name = uuid.uuid4().hex
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = cli.build_runner(cfg)
    runner.train()
    # Each epoch draws it at least once: again when it is drawn in its own place.
    (pipeline,) = (d.pipeline for d in base_datasets(runner.train_dataloader.dataset))
    count = int(pipeline.left_out)
    assert count >= 3
    (path,) = (tmp_path / "work").rglob("*.log")
    last = [line for line in path.read_text().splitlines() if "another was drawn" in line][-1]
    assert f"{count} times so far the pipeline returned nothing" in last


def test_a_pipeline_that_gives_nothing_ends(sample_data, tmp_path):
    cfg = small_config("mmpretrain", sample_data / DATA["mmpretrain"])
    for split in ("train", "val"):
        cfg[f"{split}_dataloader"].dataset.max_refetch = 10
    for split, message in (
        ("train", "number 11 in a row"),
        ("val", "a test must not skip an image"),
    ):
        loader = build_dataloader(cfg[f"{split}_dataloader"], training=split == "train")
        loader.dataset.pipeline.transforms.insert(0, GiveNothing())
        with pytest.raises(DataError, match=rf"\.JPEG: .*{message}.*"):
            loader.dataset[0]
        assert loader.dataset.pipeline.left_out == (11 if split == "train" else 0)


def test_class_folders(sample_data, tmp_path, log):
    """mmpretrain's folder layout: an empty class is named, stray files are counted."""
    root = copy_of(sample_data, "mmpretrain", tmp_path)
    (root / "train" / "empty").mkdir()
    (root / "train" / "notes.txt").write_text("stray")
    next(p for p in (root / "train").iterdir() if any(p.glob("*"))).joinpath("a.txt").touch()
    folders = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    cfg = small_config("mmpretrain", root)
    cfg.train_dataloader.dataset = {
        "type": "mmpretrain.CustomDataset",
        "data_root": str(root),
        "data_prefix": "train",
        "pipeline": cfg.train_dataloader.dataset.pipeline,
    }
    loader = build_dataloader(cfg.train_dataloader)
    assert len(loader.dataset.CLASSES) == len(folders)
    assert any("no valid file in the folder empty" in line for line in log)
    assert "left out: 2 other files" in log[-1]
    for path in (root / "train").rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(DataError, match="Found 0 files"):
        build_dataloader(cfg.train_dataloader)


def test_wrapped_data_sets_are_checked(sample_data, tmp_path, log):
    root = copy_of(sample_data, "mmpretrain", tmp_path)
    named = FAULTS["mmpretrain"]["zeros"].apply(root, "train", 1)
    cfg = small_config("mmpretrain", root)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ConcatDataset", "datasets": [inner, inner]},
    }
    loader = build_dataloader(cfg.train_dataloader)
    assert len(loader.dataset) == 16
    found = list(base_datasets(loader.dataset))
    assert len(found) == 2
    assert all(isinstance(dataset.pipeline, CheckedPipeline) for dataset in found)
    assert sum("4 images are used" in line for line in log) == 2
    with pytest.raises(DataError, match=named):
        loader.dataset[13]


def test_compressed_runs_are_those_of_pycocotools():
    from pycocotools import mask as mask_api

    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        runs = []
        while sum(runs) < height * width:
            runs.append(rng.randint(0 if not runs else 1, rng.choice((3, 60, 2000))))
        runs[-1] -= sum(runs) - height * width
        encoded = mask_api.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        assert _unpacked(encoded["counts"]) == runs
        assert _unpacked(encoded["counts"].decode()) == runs


# Whole trainings and tests on data with faults.


@pytest.fixture(scope="module")
def model_of():
    """A small model of each task, built once."""
    built = {}

    def build(task, cfg):
        if task not in built:
            torch.manual_seed(0)
            if "data_preprocessor" in cfg:
                cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
            built[task] = MODELS.build({**cfg.model, "_scope_": task})
        return built[task]

    return build


def use(cfg, model):
    """Takes a training step with every batch, and evaluates; returns losses and metrics."""
    losses, optimizer = [], torch.optim.SGD(model.parameters(), lr=1e-4)
    model.train()
    loader = build_dataloader(cfg.train_dataloader, training=True)
    collate = loader.collate_fn
    samples = items(loader)
    for first in range(0, len(samples), 2):
        # The last is in two batches if their number is odd: batch norm needs more than one.
        batch = samples[first : first + 2] if first + 2 <= len(samples) else samples[-2:]
        data = model.data_preprocessor(collate(batch), training=True)
        loss, _ = model.parse_losses(model(**data, mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    loader = build_dataloader(cfg.val_dataloader)
    collate = loader.collate_fn
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for sample in items(loader):
        batch = collate([sample])
        with torch.no_grad():
            evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    return losses, evaluator.evaluate(len(loader.dataset))


def check_faults(task, chosen, sample_data, folder, model_of, lines):
    """Applies faults and asserts what must become of them; returns whether they were refused."""
    lines.clear()
    root = copy_of(sample_data, task, folder)
    named = []
    for name, split, index in chosen:
        fault = FAULTS[task][name]
        file = fault.apply(root, split, index)
        if fault.outcome == REFUSED:
            named.append(file)
    cfg = small_config(task, root)
    model = model_of(task, cfg)
    try:
        losses, metrics = use(cfg, model)
    except DataError as error:
        refused = str(error)
    else:
        refused = None
    if named:
        assert refused, f"nothing was refused of {chosen}"
        assert any(file in refused for file in named), refused
        return True
    assert refused is None, refused
    assert losses
    assert all(map(math.isfinite, losses))
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    sizes = [line for line in lines if " are used" in line]
    for split, line in zip(("train", "val"), sizes, strict=True):
        out = [name for name, at, _ in chosen if at == split and outcome(task, name) == LEFT_OUT]
        assert ("left out" in line) == bool(out), line
    return False


def outcome(task, name):
    return FAULTS[task][name].outcome


@pytest.mark.parametrize("task", FAULTS)
def test_all_that_is_used_trains_and_tests(task, sample_data, tmp_path, model_of, log):
    """Every fault that is no damage, four at a time."""
    names = [name for name, fault in FAULTS[task].items() if fault.outcome != REFUSED]
    rng = random.Random(0)
    rng.shuffle(names)
    for number, first in enumerate(range(0, len(names), 4)):
        split = ("train", "val")[number % 2]
        size = 4 if split == "train" else 2
        chosen = [(n, split, i % size) for i, n in enumerate(names[first : first + size])]
        check_faults(task, chosen, sample_data, tmp_path / str(number), model_of, log)


@st.composite
def choices(draw):
    task = draw(st.sampled_from(sorted(FAULTS)))
    split = st.sampled_from(["train", "val"])
    places = draw(
        st.lists(st.tuples(split, st.integers(0, 1)), min_size=1, max_size=3, unique=True)
    )
    # A good part without what must be refused, so that whole trainings are run too.
    fine = (USED, LEFT_OUT)
    kinds = draw(st.sampled_from([fine, (*fine, REFUSED), (*fine, REFUSED)]))
    names = sorted(name for name, fault in FAULTS[task].items() if fault.outcome in kinds)
    chosen = [(draw(st.sampled_from(names)), *place) for place in places]
    # Two images are all that a test has, and a file that is cut is not changed any more.
    assume(sum(name == "missing" for name, *_ in chosen) < 2)
    return task, sorted(chosen, key=lambda choice: choice[0] in ("cut file", "no json"))


@pytest.mark.parametrize(
    "examples", [12, pytest.param(300, marks=pytest.mark.slow, id="many")], ids=str
)
def test_any_faults_together(examples, sample_data, tmp_path, model_of, log):
    """Files are used, left out with a count, or refused by name, within the deadline."""
    seen = {"examples": 0, "faults": 0, "refused": 0}

    @settings(
        max_examples=examples,
        derandomize=True,
        # A hang is what this is to find; the machine may be busy.
        deadline=60_000,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(choices())
    def check(choice):
        task, chosen = choice
        folder = tmp_path / uuid.uuid4().hex
        seen["refused"] += check_faults(task, chosen, sample_data, folder, model_of, log)
        seen["examples"] += 1
        seen["faults"] += len(chosen)
        shutil.rmtree(folder)

    check()
    print(seen, "of", sum(map(len, FAULTS.values())), "kinds of faults")  # noqa: T201
    assert 0 < seen["refused"] < examples
