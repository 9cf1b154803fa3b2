"""Scan patterns: drawn in the order of the oracle, and compared on the same terms."""

import csv

import numpy as np
import pytest
import torch

from mmvmamba.analysis import passes
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.scan_patterns import (
    compare_patterns,
    draw_patterns,
    path_name,
    path_positions,
    paths_of,
    pattern_table,
)
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.ss2d import SCANS
from mmvmamba_kernels.testing import listed_paths, paths

CONFIG = "configs/sample/vmamba-sample_imagenet.py"
HEIGHT, WIDTH = 3, 5


def expected_paths(scan):
    """Each direction's sequences of (row, column), by the oracle."""
    if scan == "cascade2d":
        return paths("rows", HEIGHT, WIDTH) + paths("columns", HEIGHT, WIDTH)
    return paths(scan, HEIGHT, WIDTH)


@pytest.mark.parametrize("scan", SCANS)
def test_the_order_is_the_oracles(scan):
    for path, sequences in zip(paths_of(scan), expected_paths(scan), strict=True):
        found = path_positions(path, HEIGHT, WIDTH)
        expected = [[row * WIDTH + column for row, column in line] for line in sequences]
        assert found.tolist() == expected


@pytest.mark.parametrize("scan", SCANS)
def test_the_drawn_order_is_the_oracles(scan):
    figure = draw_patterns((scan,), HEIGHT, WIDTH)
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 4
    for axes, sequences in zip(panels, expected_paths(scan), strict=True):
        # The arrows.
        quivers = [artist for artist in axes.collections if hasattr(artist, "U")]
        drawn = []
        for quiver in quivers:
            steps = np.stack([quiver.V, quiver.U], 1)
            begins = np.stack([quiver.Y, quiver.X], 1)
            np.testing.assert_array_equal(begins[1:], (begins + steps)[:-1])
            drawn.append([*map(tuple, begins.astype(int)), tuple((begins + steps)[-1].astype(int))])
        assert drawn == sequences
        # The colours, which rise along each sequence.
        colours = axes.images[0].get_array()
        for sequence in sequences:
            values = [colours[place] for place in sequence]
            np.testing.assert_allclose(values, np.linspace(0, 1, len(sequence)))
        # The dots.
        starts = [(line.get_ydata()[0], line.get_xdata()[0]) for line in axes.lines]
        assert starts == [sequence[0] for sequence in sequences]


def test_lists_of_positions_are_drawn():
    figure = draw_patterns(("window2", "atrous2", "atrous3"), HEIGHT, WIDTH)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 4 + 4 + 9
    for axes, order in zip(panels[:4], listed_paths("window2", HEIGHT, WIDTH), strict=True):
        colours = np.asarray(axes.images[0].get_array()).flatten()
        np.testing.assert_allclose(colours[order], np.linspace(0, 1, len(order)))
    for axes, order in zip(panels[4:8], listed_paths("atrous2", HEIGHT, WIDTH), strict=True):
        colours = axes.images[0].get_array()
        assert np.flatnonzero(~np.ma.getmaskarray(colours)).tolist() == sorted(order)
    assert path_name(paths_of("atrous2")[1]) == "atrous2, path 2"


def test_unknown_scans_are_refused():
    with pytest.raises(ValueError, match="choose from cross2d, unidi, bidi, cascade2d"):
        paths_of("spiral")


def test_the_comparison_measures_what_it_says():
    variants = [("cross2d", True), ("cascade2d", True), ("cross2d", False)]
    inference, training = (
        Case("inference", "fp32", 1, (32, 48)),
        Case("training", "fp32", 2, (32, 48)),
    )
    found = compare_patterns(
        CONFIG, variants, inference, training, torch.device("cpu"), seconds=0, rounds=1
    )
    assert [one.failure for one in found] == [""] * 3
    cross, cascade, bare = found
    # The pattern changes no weight; the convolutions are 3x3 for every inner channel.
    assert cross.params == cascade.params > bare.params
    assert cross.flops > bare.flops
    assert cross.inference.case.batch == 1
    assert cross.training.case.batch == 2
    assert cross.training.images_per_second == pytest.approx(2 / cross.training.seconds)
    # Two scans one after the other keep more than one over four paths.
    assert cascade.activations.bytes > cross.activations.bytes >= bare.activations.bytes > 0
    table = pattern_table(found)
    assert [row[:2] for row in table.rows] == [
        ("cross2d", "yes"), ("cascade2d", "yes"), ("cross2d", "no")
    ]  # fmt: skip
    assert table.rows[0][4] == f"{cross.inference.images_per_second:.2f}"
    assert table.rows[2][6] == f"{bare.activations.bytes / 1e6:.0f}"


def test_other_backbones_are_refused():
    case = Case("inference", "fp32", 1, (32, 32))
    with pytest.raises(UsageError, match="its backbone is ResNet, and scan patterns are VMamba's"):
        compare_patterns(
            "mmpretrain::resnet/resnet18_8xb32_in1k.py",
            [("cross2d", True)],
            case,
            case,
            torch.device("cpu"),
            0,
        )


@pytest.fixture
def run_tool(analysis_tool):
    """Runs the command line; gives its exit status and output."""
    return analysis_tool("scan_patterns", columns=120)


def test_the_picture_from_the_command_line(run_tool, tmp_path):
    status, _ = run_tool("--grid", str(HEIGHT), str(WIDTH), "--out", "new/p.png")
    assert status == 0
    assert (tmp_path / "new/p.png").stat().st_size > 10_000
    arrays = np.load(tmp_path / "new/p.npz")
    assert len(arrays.files) == 16
    status, _ = run_tool("--scans", "hilbert", "--grid", "4", "4", "--out", "hilbert.png")
    assert status == 0
    assert sorted(np.load(tmp_path / "hilbert.npz")["hilbert_1"][0]) == list(range(16))
    assert run_tool("--scans", "spiral")[0] == 2
    assert arrays["cross2d_2"].tolist() == [[0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14]]


def test_the_comparison_from_the_command_line(run_tool, tmp_path, monkeypatch):
    status, out = run_tool(
        "--compare", "--config", CONFIG, "--scans", "cross2d", "--size", "32", "--seconds", "0",
        "--rounds", "1", "--csv", "rows.csv",
    )  # fmt: skip
    assert status == 0
    with (tmp_path / "rows.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["scan"], row["dwconv"]) for row in rows] == [
        ("cross2d", "True"), ("cross2d", "False")
    ]  # fmt: skip
    assert all(float(row["training_images_per_second"]) > 0 for row in rows)
    assert f"{int(rows[0]['params']) / 1e6:.1f}" in out
    monkeypatch.setitem(passes.TOLERANCES, "bf16", (0.0, 0.0))
    status, out = run_tool(
        "--compare", "--config", CONFIG, "--scans", "cross2d", "--size", "32", "--seconds", "0",
        "--rounds", "1", "--precision", "bf16",
    )  # fmt: skip
    assert "2 of 2 variants failed" in status
    (tmp_path / "other.csv").write_text("a,b\n")
    status, _ = run_tool("--compare", "--config", CONFIG, "--csv", "other.csv")
    assert "other.csv has other columns" in status
