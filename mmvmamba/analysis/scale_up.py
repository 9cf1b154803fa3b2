"""A classifier on larger images than it was trained on (paper, table 9 and figure 11).

Every size has three parts: what it costs, its accuracy as it is, and its accuracy after tuning of
the last linear layer on the features of that size. A part that is done is kept in a JSON file and
not done again.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config

from mmvmamba.analysis.flops import count_config
from mmvmamba.analysis.passes import Case, PrecisionName
from mmvmamba.analysis.reports import Table
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.analysis.throughput import measure_case
from mmvmamba.engine import cli
from mmvmamba.engine.data import datasets_of
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import scope_of, type_name
from mmvmamba.models import VMamba
from mmvmamba.models.checkpoint import CheckpointError

SIZES = (224, 288, 384, 512, 640, 768)

# The recipe of the tuning, which the configs of table 9 share.
TUNED_MODEL = "configs/_base_/models/linear_vmamba.py"
TUNING_SCHEDULE = "configs/_base_/schedules/vmamba_linear_imagenet.py"


@dataclass(frozen=True)
class Study:
    """What is measured.

    Attributes:
        config: A config of a classifier.
        checkpoint: Its weights, official ones too.
        work_dir: Folder for logs, tuned weights and the results.
        data_root: Where the data set is, if not where the config says.
        cfg_options: Overrides of the config.
        tune: Whether the last layer is tuned at every size; for VMamba only.
        tuning_options: Overrides of the tuning's config.
        batches: Images in a batch when inference and training are timed.
        precision: Of what is timed.
        device: Where it is timed. Accuracy is measured where mmengine does.
        seconds: How long each is timed; 0 for one call.
    """

    config: str
    checkpoint: str
    work_dir: Path
    data_root: str | None = None
    cfg_options: Mapping[str, object] = field(default_factory=dict)
    tune: bool = False
    tuning_options: Mapping[str, object] = field(default_factory=dict)
    batches: tuple[int, int] = (32, 32)
    precision: PrecisionName = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 5.0

    @property
    def file(self) -> Path:
        """Where the results are kept."""
        return self.work_dir / "scale_up.json"

    def identity(self) -> dict:
        """What results of another run must share with this one's."""
        return {
            "config": self.config,
            "checkpoint": self.checkpoint,
            "data_root": self.data_root,
            "cfg_options": {key: str(value) for key, value in self.cfg_options.items()},
            "tuning_options": {key: str(value) for key, value in self.tuning_options.items()},
            "batches": list(self.batches),
            "precision": self.precision,
            "device": str(self.device),
        }


def run_study(
    study: Study, sizes: Sequence[int] = SIZES, report: Callable[[str], None] = lambda _: None
) -> dict[int, dict[str, dict]]:
    """Measures a classifier at several sizes, but for what has been measured before.

    Args:
        study: What is measured.
        sizes: Sides of the images in pixels.
        report: Called with a line about each part before it begins.

    Returns:
        For each size, its parts: 'cost' (`params`, `flops`, `images_per_second`,
        `training_images_per_second`, `failure`), 'accuracy' and, if asked for, 'tuned' (the
        evaluator's metrics, such as `accuracy/top1`, in percent).

    Raises:
        UsageError: If the config is no classifier's, its test images have no crop whose size could
            be changed, its last layer cannot be tuned, or the results file is of another study.
        CheckpointError: If the weights cannot be loaded.
    """
    parts = {"cost": measure_cost, "accuracy": measure_accuracy}
    if study.tune:
        parts["tuned"] = tune
        _check_tunable(_test_config(study, study.checkpoint, sizes[0]))
    results = read_results(study)
    for size in sizes:
        done = results.setdefault(size, {})
        for part, measure in parts.items():
            if part in done:
                report(f"{size} pixels, {part}: already done")
                continue
            report(f"{size} pixels, {part}")
            done[part] = measure(study, size)
            _write_results(study, results)
    return {size: results[size] for size in sizes}


def read_results(study: Study) -> dict[int, dict[str, dict]]:
    """The parts that are done, by size.

    Raises:
        UsageError: If the file is of another study, or damaged.
    """
    if not study.file.exists():
        return {}
    try:
        content = json.loads(study.file.read_text(encoding="utf-8"))
        known, results = content["study"], content["sizes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{study.file} is not a file of results ({error}): remove it, or choose another folder."
        ) from error
    different = [key for key, value in study.identity().items() if known.get(key) != value]
    if different:
        lines = (f"\n  {key}: {known.get(key)}, now {study.identity()[key]}" for key in different)
        raise UsageError(
            f"{study.file} has results of another study; choose another --work-dir."
            + "".join(lines)
        )
    return {int(size): parts for size, parts in results.items()}


def _write_results(study: Study, results: dict[int, dict[str, dict]]) -> None:
    study.work_dir.mkdir(parents=True, exist_ok=True)
    content = {"study": study.identity(), "sizes": dict(sorted(results.items()))}
    # In one step, so that a run that is stopped leaves a whole file.
    new = study.file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(study.file)


def measure_cost(study: Study, size: int) -> dict:
    """Parameters, FLOPs and throughput at a size."""
    cfg = cli.load_config(study.config, study.cfg_options)
    counted = count_config(cfg, (size, size))
    subject = find_subject(study.config, overrides=study.cfg_options)
    found: dict = {"params": counted.params, "flops": counted.flops, "failure": ""}
    names = ("images_per_second", "training_images_per_second")
    for name, passes, batch in zip(names, ("inference", "training"), study.batches, strict=True):
        case = Case(passes, study.precision, batch, (size, size))
        (result,) = measure_case([subject], case, study.device, study.seconds)
        found[name] = result.images_per_second
        found["failure"] = found["failure"] or result.failure
    return found


def measure_accuracy(study: Study, size: int) -> dict:
    """The metrics of the config's evaluator on its test images at a size."""
    return _run(_test_config(study, study.checkpoint, size)).test()


def tune(study: Study, size: int) -> dict:
    """Tunes the last layer from random values at a size; then as `measure_accuracy`.

    A tuning that was stopped goes on from its last checkpoint.
    """
    cfg = tuning_config(study, size)
    _run(cfg).train()
    last = Path(cfg.work_dir) / f"epoch_{cfg.train_cfg.max_epochs}.pth"
    if not last.is_file():
        raise CheckpointError(
            f"the tuning left no {last}: let checkpoints be written each epoch "
            "(default_hooks.checkpoint.interval=1)."
        )
    return _run(_test_config(study, str(last), size)).test()


def tuning_config(study: Study, size: int) -> Config:
    """The config that tunes the last layer on images of a size, as the configs of table 9 do."""
    folder = study.work_dir / f"tuned_{size}"
    arguments = [*_arguments(study, folder), "--no-validate"]
    begun = (folder / "last_checkpoint").is_file()
    options = cli.parse_train_arguments([study.config, *arguments, *["--resume"] * begun])
    options.cfg_options = dict(study.cfg_options)
    cfg = cli.train_config(options)
    set_image_size(cfg, size)
    _check_tunable(cfg)
    recipe, schedule = cli.load_config(TUNED_MODEL), cli.load_config(TUNING_SCHEDULE)
    cfg.model.backbone.frozen_stages = len(_arch(cfg).depths)
    cfg.model.head.loss = recipe.model.head.loss
    # Mixup and the like, and averages of weights, belong to the training of all layers.
    cfg.model.train_cfg = None
    cfg.custom_hooks = []
    if not begun:
        cfg.load_from, cfg.load_ignore = study.checkpoint, recipe.load_ignore
    for key in ("train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr"):
        cfg[key] = schedule[key]
    cfg.auto_scale_lr.enable = True
    # The features of an image are always the same.
    (_, test), *_ = datasets_of(cfg, ("test",))
    for _, dataset in datasets_of(cfg, ("train",)):
        dataset.pipeline = test.pipeline
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1, by_epoch=True)
    cfg.merge_from_dict(dict(study.tuning_options))
    return cfg


def set_image_size(cfg: Config, size: int) -> None:
    """Lets a config's test images be cut to a size, at the same ratio to their shorter side.

    Args:
        cfg: The config, changed in place.
        size: Side of the images in pixels.

    Raises:
        UsageError: If the test images are not cut.
    """
    for _, dataset in datasets_of(cfg, ("test",)):
        steps = {type_name(step): step for step in dataset.pipeline}
        crop, edge = steps.get("CenterCrop"), steps.get("ResizeEdge")
        if crop is None or not isinstance(crop.crop_size, int):
            raise UsageError(
                "the config's test pipeline has no CenterCrop with one crop_size, which is what is "
                f"changed from size to size; its steps are {', '.join(steps)}."
            )
        if edge is not None:
            edge.scale = edge.scale * size // crop.crop_size
        crop.crop_size = size


def _test_config(study: Study, checkpoint: str, size: int) -> Config:
    folder = study.work_dir / f"test_{size}"
    options = cli.parse_test_arguments([study.config, checkpoint, *_arguments(study, folder)])
    options.cfg_options = dict(study.cfg_options)
    cfg = cli.test_config(options)
    if scope_of(cfg) != "mmpretrain":
        raise UsageError(
            f"{study.config} is not a classifier's config: table 9 is about classifiers."
        )
    set_image_size(cfg, size)
    return cfg


def _arguments(study: Study, folder: Path) -> list[str]:
    root = ["--data-root", study.data_root] if study.data_root else []
    return ["--work-dir", str(folder), *root]


def _run(cfg: Config):
    # mmengine keeps a process's runs and visualizers by name, and hands out an old one where the
    # name is known.
    cfg.experiment_name = uuid.uuid4().hex
    if cfg.get("visualizer"):
        cfg.visualizer.name = cfg.experiment_name
    return cli.build_runner(cfg)


def _check_tunable(cfg: Config) -> None:
    kinds = (type_name(cfg.model.get("backbone")), type_name(cfg.model.get("head")))
    if kinds != ("VMamba", "VMambaClsHead"):
        raise UsageError(
            "linear tuning is of VMamba with VMambaClsHead; the config has "
            f"{' and '.join(map(str, kinds))}: measure it without tuning."
        )


def _arch(cfg: Config):
    arch = cfg.model.backbone.get("arch", "tiny")
    return VMamba.find_arch(arch if isinstance(arch, str) else dict(arch))


def study_table(results: Mapping[int, Mapping[str, Mapping]]) -> Table:
    """Table 9."""

    def number(parts: Mapping, part: str, key: str, scale: float = 1) -> str:
        value = parts.get(part, {}).get(key)
        return "-" if value is None else f"{value / scale:.2f}"

    columns = (
        ("params (M)", "cost", "params", 1e6),
        ("FLOPs (G)", "cost", "flops", 1e9),
        ("images/s", "cost", "images_per_second", 1),
        ("training images/s", "cost", "training_images_per_second", 1),
        ("top 1", "accuracy", "accuracy/top1", 1),
        ("top 1, tuned", "tuned", "accuracy/top1", 1),
    )
    rows = tuple(
        (str(size), *(number(parts, *where) for _, *where in columns))
        for size, parts in results.items()
    )
    failures = (
        f"{size}: {parts['cost']['failure']}"
        for size, parts in results.items()
        if parts.get("cost", {}).get("failure")
    )
    return Table("by image side", ("side", *(name for name, *_ in columns)), rows, tuple(failures))


def draw_study(results: Mapping[int, Mapping[str, Mapping]]):
    """Draws accuracy, throughput and FLOPs over the image's side (paper, figures 4 and 11).

    Args:
        results: What `run_study` gave.

    Returns:
        matplotlib's figure.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.figure import Figure

    top1, rate = "accuracy/top1", "images_per_second"
    panels = {
        "top-1 accuracy (%)": {
            "as trained": ("accuracy", top1, 1),
            "last layer tuned": ("tuned", top1, 1),
        },
        "images/s": {
            "inference": ("cost", rate, 1),
            "training": ("cost", f"training_{rate}", 1),
        },
        "FLOPs (G)": {"": ("cost", "flops", 1e9)},
    }
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (quantity, curves) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        for name, (part, key, scale) in curves.items():
            points = [
                (size, parts[part][key] / scale)
                for size, parts in sorted(results.items())
                if parts.get(part, {}).get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title(quantity)
        axes.set_xlabel("image side (pixels)")
        axes.set_xticks(sorted(results))
        axes.grid(alpha=0.3)
        if len(curves) > 1 and axes.lines:
            axes.legend(fontsize="small")
            # Accuracies differ by little.
            if part == "cost":
                axes.set_ylim(bottom=0)
    return figure
