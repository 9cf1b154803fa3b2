"""The paper's tables of models: their rows are data, and each is built, counted and timed here.

Every row is timed with the table's VMamba-T of the same size, in turns, so that its ratio does not
depend on what the machine does meanwhile, and no more than two models are in memory. VMamba-T is
prepared once for all rows of a size. Accuracies are the paper's.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config

from mmvmamba.analysis.flops import Complexity, count_config
from mmvmamba.analysis.measured import Subject
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.reports import Table
from mmvmamba.analysis.subjects import config_subject
from mmvmamba.analysis.throughput import FAILURES, Contestant, Result, conditions, take_turns
from mmvmamba.engine.cli import load_config

FILE = Path(__file__).with_suffix(".json")
REFERENCE = "VMamba-T"

# What the paper calls the throughput of a pass.
THROUGHPUT = {"inference": "throughput", "training": "training"}


@dataclass(frozen=True)
class Row:
    """A model of a table, and what the paper says of it.

    Attributes:
        name: The paper's name.
        config: A config, 'package::folder/file.py'.
        shape: Height and width of the images in pixels.
        params: Parameters in millions.
        flops: FLOPs in G; None where the paper has none.
        throughput: Images per second in inference, on an A100; None where the paper has none.
        training: The same in training.
        metrics: Accuracies in percent.
        backbone: Settings that replace those of the config's backbone; with 'type', all of them.
        width: Channels of the first stage of a backbone that takes the place of the config's.
        tolerance: How far, relatively, FLOPs may be from the paper's.
        expected: Parameters and FLOPs where the paper's cannot be right.
        why: The arithmetic of `expected`.
    """

    name: str
    config: str
    shape: tuple[int, int]
    params: float
    flops: float | None = None
    throughput: float | None = None
    training: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    backbone: Mapping[str, object] = field(default_factory=dict)
    width: int | None = None
    tolerance: float = 0.01
    expected: Mapping[str, float | None] | None = None
    why: str = ""

    def load(self, size: tuple[int, int] | None = None) -> Config:
        """The row's config; `size` is for models that are made for images of one size."""
        cfg = deepcopy(_load(self.config))
        backbone = cfg.model.backbone
        if "type" in self.backbone:
            cfg.model.backbone = backbone = dict(self.backbone)
            widths = [self.width * 2**i for i in range(4)]
            if cfg.default_scope == "mmdet":
                cfg.model.neck.in_channels = widths
            else:
                cfg.model.decode_head.in_channels = widths
                cfg.model.auxiliary_head.in_channels = widths[2]
        else:
            backbone.update(self.backbone)
        if size is not None and "img_size" in backbone:
            backbone["img_size"] = size
        return cfg

    def subject(self) -> Subject:
        """What is timed."""
        subject = config_subject(self.name, self.load())
        return dataclasses.replace(
            subject, build=lambda size: config_subject(self.name, self.load(size)).build(size)
        )

    def count(self) -> Complexity:
        """Parameters, and FLOPs of an image of the paper's size."""
        return count_config(self.load(), self.shape)

    @property
    def model(self) -> str:
        """What rows of the same model share."""
        return json.dumps([self.config, dict(self.backbone)], sort_keys=True)


@dataclass(frozen=True)
class PaperTable:
    """A table, or a part of one with models of one kind.

    Attributes:
        name: '6', or '2, ADE20K' for a part.
        title: What it is about.
        rows: Its rows, in the paper's order.
        passes: What the paper times.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    passes: tuple[str, ...] = ("inference",)

    def reference(self, row: Row) -> Row:
        """What a row is compared with: VMamba-T on images of its size, or else the first row."""
        named = (REFERENCE, f"{REFERENCE} at {row.shape[0]}")
        return next((other for other in self.rows if other.name in named), self.rows[0])


@functools.cache
def _load(config: str) -> Config:
    return load_config(config)


@functools.cache
def read_tables() -> tuple[PaperTable, ...]:
    """All tables, in the paper's order."""
    tables = json.loads(FILE.read_text(encoding="utf-8"))["tables"]
    by_name = {f"{table['table']}: {row['row']}": row for table in tables for row in table["rows"]}
    return tuple(
        PaperTable(
            table["table"],
            table["title"],
            tuple(_read_row(table, row, by_name) for row in table["rows"]),
            tuple(table.get("passes", ["inference"])),
        )
        for table in tables
    )


def _read_row(table: Mapping, row: Mapping, by_name: Mapping[str, Mapping]) -> Row:
    common = {key: table[key] for key in ("shape", "tolerance") if key in table}
    model = by_name[row["as"]] if "as" in row else row
    settings = {key: model[key] for key in ("config", "backbone", "width") if key in model}
    settings |= common | row
    config = settings["config"]
    settings["config"] = config if "::" in config else f"mmvmamba::{config}"
    settings["shape"] = tuple(settings["shape"])
    name = settings.pop("row")
    settings.pop("as", None)
    return Row(name, **settings)


def find_tables(name: str) -> list[PaperTable]:
    """A table, by its number or with the name of a part: '6', '2', '2, COCO', '2, COCO 3x'.

    Raises:
        ValueError: If the paper has no such table of models; the message has those it has.
    """
    wanted, tables = _words(name), read_tables()
    found = [table for table in tables if _words(table.name)[: len(wanted)] == wanted]
    if not wanted or not found:
        numbers = dict.fromkeys(table.name.split(", ")[0] for table in tables)
        raise ValueError(f"there is no table {name!r} of models, choose from {', '.join(numbers)}")
    return found


def _words(name: str) -> list[str]:
    return name.replace(",", " ").split()


@dataclass(frozen=True)
class Measured:
    """What was found out about a row.

    Attributes:
        row: The row.
        complexity: Parameters and FLOPs; None if they could not be counted.
        timed: For each pass, the row's result and that of its reference in the same turns.
        failures: What could not be done, and why.
    """

    row: Row
    complexity: Complexity | None
    timed: Mapping[str, tuple[Result, Result]]
    failures: tuple[str, ...]


class Measurement:
    """Counts and times rows; what several tables have in common is done once.

    Args:
        device: Where.
        seconds: How long to time each model and pass.
        rounds: How many turns that is split in.
    """

    def __init__(self, device: torch.device, seconds: float, rounds: int):
        self.device, self.seconds, self.rounds = device, seconds, rounds
        self._counts: dict[tuple, Complexity | str] = {}
        self._times: dict[tuple, tuple[Result, Result]] = {}
        self._kept: dict[tuple, Contestant] = {}

    def __call__(
        self,
        table: PaperTable,
        rows: Sequence[Row],
        cases: Sequence[Case],
        size: tuple[int, int] | None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> list[Measured]:
        """Measures rows of a table in each case, but for the cases' sizes.

        Args:
            table: The table.
            rows: The rows.
            cases: The passes, of any size.
            size: Height and width at which all rows are timed; None for each row's own.
            progress: Called with a row's name before it is counted, and before each case.

        Returns:
            What was found out, in the rows' order.
        """
        counts = {}
        for row in rows:
            progress(row.name)
            counts[row.name] = self._count(row)
        timed: dict[str, dict[str, tuple[Result, Result]]] = {row.name: {} for row in rows}
        for passes in cases:
            # Those of one size after one another, so that one VMamba-T is kept at a time.
            for row in sorted(rows, key=lambda row: row.shape):
                progress(row.name)
                case = dataclasses.replace(passes, size=size or row.shape)
                timed[row.name][case.passes] = self._time(table.reference(row), row, case)
        return [self._measured(row, counts[row.name], timed[row.name]) for row in rows]

    def _measured(
        self, row: Row, count: Complexity | str, timed: Mapping[str, tuple[Result, Result]]
    ) -> Measured:
        complexity = None if isinstance(count, str) else count
        failures = [count] if complexity is None else []
        failures += [f"{name}: {own.failure}" for name, (own, _) in timed.items() if own.failure]
        return Measured(row, complexity, timed, tuple(failures))

    def _count(self, row: Row) -> Complexity | str:
        key = row.model, row.shape
        if key not in self._counts:
            try:
                self._counts[key] = row.count()
            except FAILURES as error:
                self._counts[key] = f"it cannot be counted: {_first_line(error)}"
        return self._counts[key]

    def _time(self, reference: Row, row: Row, case: Case) -> tuple[Result, Result]:
        key = reference.model, row.model, case
        if key not in self._times:
            with conditions(case, self.device, 2):
                contestants = [self._prepare_reference(reference, case)]
                if reference.model != row.model:
                    contestants.append(Contestant(row.subject(), case, self.device))
                found = take_turns(contestants, self.seconds, self.rounds)
            self._times[key] = found[-1], found[0]
        return self._times[key]

    def _prepare_reference(self, reference: Row, case: Case) -> Contestant:
        key = reference.model, case
        if key not in self._kept:
            self._kept.clear()
            self._kept[key] = Contestant(reference.subject(), case, self.device)
        return self._kept[key]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def comparison(table: PaperTable, measured: Sequence[Measured], cases: Sequence[Case]) -> Table:
    """What was measured in some cases, beside the paper's figures."""
    passes = [case.passes for case in cases]
    metrics = list(dict.fromkeys(name for row in table.rows for name in row.metrics))
    reference = table.reference(table.rows[0]).name.partition(" at ")[0]
    header = ["model", "params (M)", "paper", "FLOPs (G)", "paper"]
    for name in passes:
        header += [f"{name} (images/s)", f"of {reference}'s", "paper"]
    header += [f"{name} (paper)" for name in metrics]
    rows = []
    for found in measured:
        row, complexity = found.row, found.complexity
        cells = [
            row.name,
            "-" if complexity is None else f"{complexity.params / 1e6:.1f}",
            f"{row.params:g}",
            "-" if complexity is None else f"{complexity.flops / 1e9:.4g}",
            _figure(row.flops),
        ]
        for name in passes:
            cells += _times(found, table.reference(row), name)
        cells += [_figure(row.metrics.get(name)) for name in metrics]
        rows.append(tuple(cells))
    notes = [f"{found.row.name}: {why}" for found in measured for why in found.failures]
    for name in passes:
        done = [found.timed[name][0].case for found in measured]
        sizes = dict.fromkeys(str(case) for case in done)
        notes.insert(0, f"Timed: {'; '.join(sizes)}.")
    return Table(f"table {table.name}: {table.title}", tuple(header), tuple(rows), tuple(notes))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _times(found: Measured, reference: Row, name: str) -> list[str]:
    result, other = found.timed[name]
    papers = [getattr(row, THROUGHPUT[name]) for row in (found.row, reference)]
    paper = f"{papers[0] / papers[1]:.2f}" if all(papers) else "-"
    if result.failure:
        return ["failed", "-", paper]
    speed = result.images_per_second
    ratio = "-" if other.failure else f"{speed / other.images_per_second:.2f}"
    return [f"{speed:.3g}", ratio, paper]
