"""The paper's tables: their rows as data, and what benchmark.py --table makes of them."""

import re
from dataclasses import replace

import pytest
import torch

from mmvmamba.analysis import paper_tables
from mmvmamba.analysis.paper_tables import (
    Measured,
    Measurement,
    PaperTable,
    Row,
    comparison,
    find_tables,
    read_tables,
)
from mmvmamba.analysis.passes import PASSES, Case
from mmvmamba.analysis.throughput import Result

SAMPLE = "mmvmamba::sample/vmamba-sample_imagenet.py"
CASE = Case("inference", "fp32", 2, (32, 32))

VMAMBA = Row("VMamba-T", SAMPLE, (32, 32), params=2, throughput=200.0, metrics={"Top-1": 82.6})
SLOWER = Row("Slow-T", SAMPLE, (32, 32), params=3, flops=0.5, throughput=50.0)


def test_rows_of_the_four_tables_are_the_papers():
    """Their numbers of rows, and a row with all that can be in one."""
    counts = {table.name: len(table.rows) for table in read_tables()}
    expected = {"2, COCO 1x": 9, "2, COCO 3x": 8}
    assert {name: counts[name] for name in expected} == expected
    (table,) = find_tables("6")
    row = next(row for row in table.rows if row.name == "HiViT-B")
    assert table.passes == ("inference", "training")
    assert (row.params, row.flops, row.throughput, row.training) == (66, 15.8, 456, 544)
    assert row.metrics == {"Top-1": 83.8}
    assert [table.name for table in find_tables("2")] == ["2, COCO 1x", "2, COCO 3x", "2, ADE20K"]
    assert [table.name for table in find_tables("2, COCO")] == ["2, COCO 1x", "2, COCO 3x"]
    assert [table.name for table in find_tables("2, ADE20K")] == ["2, ADE20K"]
    for name in ("99", ""):
        with pytest.raises(
            ValueError, match=f"no table '{name}' of models, choose from 1, 2, 3, 5, 6"
        ):
            find_tables(name)


def test_a_row_of_another_table_is_the_same_model_with_its_own_figures():
    (one,), (six,) = find_tables("1"), find_tables("6")
    swin = [next(r for r in table.rows if r.name == "Swin-B") for table in (one, six)]
    assert swin[0].model == swin[1].model
    assert [row.flops for row in swin] == [15.4, 15.5]


def test_a_row_is_compared_with_vmamba_on_images_of_its_size():
    (nine,) = find_tables("9")
    row = next(row for row in nine.rows if row.name == "Swin-T at 384")
    assert nine.reference(row).name == "VMamba-T at 384"
    (one,) = find_tables("1")
    assert one.reference(one.rows[0]).name == "VMamba-T"


def test_models_are_made_for_the_images_size():
    (six,) = find_tables("6")
    hivit = next(row for row in six.rows if row.name == "HiViT-T")
    assert hivit.load((64, 96)).model.backbone.img_size == (64, 96)
    assert hivit.load().model.backbone.img_size == 224


def test_figures_stand_beside_the_papers():
    table = PaperTable("6", "ImageNet", (VMAMBA, SLOWER), ("inference",))
    results = [
        Result(row.name, CASE, images_per_second=speed)
        for row, speed in ((VMAMBA, 30.0), (SLOWER, 10.0))
    ]
    failed = Result(SLOWER.name, CASE, "it does not fit")
    count = VMAMBA.count()
    rows = [
        Measured(VMAMBA, count, {"inference": (results[0], results[0])}, ()),
        Measured(SLOWER, count, {"inference": (results[1], replace(results[0]))}, ()),
        Measured(
            SLOWER, None, {"inference": (failed, results[0])}, ("inference: it does not fit",)
        ),
    ]
    made = comparison(table, rows, [CASE])
    assert made.header == (
        "model", "params (M)", "paper", "FLOPs (G)", "paper",
        "inference (images/s)", "of VMamba-T's", "paper", "Top-1 (paper)",
    )  # fmt: skip
    params, flops = f"{count.params / 1e6:.1f}", f"{count.flops / 1e9:.4g}"
    assert made.rows == (
        ("VMamba-T", params, "2", flops, "-", "30", "1.00", "1.00", "82.6"),
        ("Slow-T", params, "3", flops, "0.5", "10", "0.33", "0.25", "-"),
        ("Slow-T", "-", "3", "-", "0.5", "failed", "-", "0.25", "-"),
    )
    assert "Slow-T: inference: it does not fit" in made.notes
    assert "Timed: inference, fp32, eager, 2x32x32." in made.notes


def test_what_rows_and_tables_share_is_done_once(monkeypatch):
    """VMamba-T is prepared once for all rows of a size, and no model is counted or timed twice."""
    calls = []

    class Prepared:
        def __init__(self, subject, case, _):
            calls.append(f"prepare {subject.name} {case.shape}")
            self.name, self.case = subject.name, case

    def take_turns(contestants, *_):
        calls.append(f"time {' and '.join(one.name for one in contestants)}")
        return [Result(one.name, one.case, images_per_second=1.0) for one in contestants]

    monkeypatch.setattr(paper_tables, "Contestant", Prepared)
    monkeypatch.setattr(paper_tables, "take_turns", take_turns)
    monkeypatch.setattr(Row, "count", lambda row: calls.append(f"count {row.name}"))
    other = replace(SLOWER, backbone={"with_cp": True})
    third = replace(other, name="Large-T", shape=(64, 64), backbone={"with_cp": False})
    small = replace(VMAMBA, name="VMamba-T at 32")
    large = replace(VMAMBA, name="VMamba-T at 64", shape=(64, 64))
    measure = Measurement(torch.device("cpu"), 0.0, 1)
    for name in ("1", "6"):
        rows = (third, small, other, large)
        found = measure(PaperTable(name, "", rows), rows, [CASE], None)
        assert [f.row.name for f in found] == [row.name for row in rows]
        assert [f.timed["inference"][0].case.size for f in found] == [row.shape for row in rows]
        assert found[2].timed["inference"][1].model == "VMamba-T at 32"
        assert found[0].timed["inference"][1].model == "VMamba-T at 64"
    assert calls == [
        *(f"count {name}" for name in ("Large-T", "VMamba-T at 32", "Slow-T", "VMamba-T at 64")),
        "prepare VMamba-T at 32 2x32x32",
        "time VMamba-T at 32",
        "prepare Slow-T 2x32x32",
        "time VMamba-T at 32 and Slow-T",
        "prepare VMamba-T at 64 2x64x64",
        "prepare Large-T 2x64x64",
        "time VMamba-T at 64 and Large-T",
        "time VMamba-T at 64",
    ]


def test_all_rows_are_timed_at_a_given_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(Row, "count", lambda _: None)
    monkeypatch.setattr(
        Measurement, "_time", lambda _, reference, row, case: sizes.append(case.size) or (case,) * 2
    )
    monkeypatch.setattr(Measurement, "_measured", lambda *_: None)
    rows = (VMAMBA, SLOWER)
    Measurement(torch.device("cpu"), 0.0, 1)(PaperTable("1", "", rows), rows, [CASE], (64, 48))
    assert sizes == [(64, 48)] * 2


@pytest.fixture
def two_tables(monkeypatch):
    wrong = replace(SLOWER, name="Wrong-T", backbone={"arch": "huge"})
    tables = (
        PaperTable("7", "good", (VMAMBA, SLOWER)),
        PaperTable("8", "several sizes", (VMAMBA, replace(SLOWER, shape=(64, 64)))),
        PaperTable("9", "bad", (VMAMBA, wrong)),
    )
    monkeypatch.setattr(paper_tables, "read_tables", lambda: tables)


@pytest.mark.usefixtures("two_tables")
def test_command_line(analysis_tool, tmp_path):
    run = analysis_tool("benchmark", columns=200)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin measured -->\n<!-- end measured -->\n")
    fast = ("--seconds", "0", "--rounds", "1", "--batch", "1")
    status, text = run("--table", "7", *fast, "--markdown", str(page))
    assert status == 0, text
    assert re.search(r"Slow-T +\d+\.\d +3 +[\d.]+ +0.5 +[\d.e+]+ +\d\.\d\d +0.25", text)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| Slow-T |")]
    assert len(rows) == 1
    assert "benchmark.py --device cpu --table 7" in page.read_text()

    status, text = run("--table", "8", "--sizes", "32", "48", *fast)
    assert status == 0
    assert text.count("(images/s)") == 1
    assert "VMamba-T" in text
    assert "Slow-T" not in text

    status, text = run("--table", "9", *fast)
    assert status != 0
    assert re.search(r"Wrong-T +- +3 +- +0.5 +failed", text)
    assert "Wrong-T: it cannot be counted: " in text
    assert "'huge' is unknown" in text


@pytest.mark.usefixtures("two_tables")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "3"], "there is no table '3' of models, choose from 7, 8, 9"),
        (["--table", "7", "--sizes", "32", "64"], "--sizes: table 7 is measured at one size"),
    ],
)
def test_mistakes_are_told(analysis_tool, arguments, message):
    status, _ = analysis_tool("benchmark")(*arguments)
    assert message in str(status)


@pytest.fixture
def tool(load_tool):
    return load_tool("benchmark")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["6"], ["inference, fp32, eager, 1x224x224"]),
        (
            ["6", "--passes", "inference", "training", "--batch", "2", "--sizes", "5x64x32"],
            ["inference, fp32, eager, 5x64x32", "training, fp32, eager, 5x64x32"],
        ),
        (["2, ADE20K"], ["inference, fp32, eager, 1x224x256"]),
        (["2, ADE20K", "--sizes", "64"], ["inference, fp32, eager, 1x64x64"]),
        (["6", "--device", "cuda"], [f"{pass_}, fp32, eager, 128x224x224" for pass_ in PASSES]),
        (["2, ADE20K", "--device", "cuda"], ["inference, fp32, eager, 128x512x2048"]),
    ],
)
def test_defaults_of_a_table_let_it_take_minutes(tool, arguments, expected):
    options = tool.parse_arguments(["--device", "cpu", "--table", *arguments])
    before = vars(options).copy()
    (table,) = find_tables(options.table)
    rows, batch, size = tool.choose_rows(options, table)
    assert rows == list(table.rows)
    found = tool.cases(options, options.passes or table.passes, [(batch, size or rows[0].shape)])
    assert [str(case) for case in found] == expected
    assert (options.seconds, options.rounds) == ((5, 5) if "cuda" in arguments else (0.2, 1))
    assert vars(options) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "--table has its own models and form: leave out models"),
        (["--csv", "a.csv", "--activations"], "leave out --csv, --activations"),
        (["--precision", "fp32", "bf16"], "--table takes one --precision and one --execution"),
    ],
)
def test_what_a_table_does_not_take(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.parse_arguments(["--table", "7", *arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", ["1", "2, COCO", "2, ADE20K", "6", "9"])
def test_every_row_runs(number, analysis_tool):
    """The four tables on a CPU, on images as small as every row takes."""
    size = "64" if number.startswith("2") else "224"
    fast = ("--seconds", "0", "--sizes", size)
    status, text = analysis_tool("benchmark", columns=240)("--table", number, *fast)
    assert status == 0, text
    rows = sum(len(table.rows) for table in find_tables(number))
    assert len(re.findall(r"\d\.\d\d +[\d.-]+ ", text)) >= (rows / 6 if number == "9" else rows)
