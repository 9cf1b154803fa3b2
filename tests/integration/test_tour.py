"""The notebook demo/tour.ipynb, executed cell by cell."""

import json
import os
import shutil

import pytest
from tiny import run_python

# Most of the time goes into 150 classes for each pixel: here images of half the side.
CHOSEN = "options.cfg_options = {"
SMALLER = """
    "model.data_preprocessor.size": (64, 64),
    "train_dataloader.dataset.pipeline.2.scale": (96, 72),
    "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
    "test_dataloader.dataset.pipeline.1.scale": (96, 72),
"""
# A notebook shows the value of a cell's last expression; here it is evaluated, which is as good.
EXECUTE = """
import ast, json, sys

cells = json.load(open(sys.argv[1]))["cells"]
codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
chosen, smaller = sys.argv[2:]
assert sum(chosen in code for code in codes) == 1
codes = [code.replace(chosen, chosen + smaller) for code in codes]
namespace = {"__name__": "__main__"}
shown = []
for number, code in enumerate(codes, 1):
    tree = ast.parse(code, f"cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), namespace)
    if last:
        value = compile(ast.Expression(last.value), f"cell {number}", "eval")
        shown.append(eval(value, namespace))
samples = [pair.sample for pair in namespace["pairs"]]
pairs = [(one.pred_sem_seg.data, one.gt_sem_seg.data) for one in samples]
right = sum(int((p == t)[t != 255].sum()) for p, t in pairs)
iterations, loss = namespace["losses"]
json.dump({
    "folder": str(namespace["folder"]),
    "cells": len(codes),
    "shapes": shown[1],
    "cost": [namespace["cost"].params, namespace["cost"].flops],
    "pictures": [list(one.size) for one in shown if hasattr(one, "size")],
    "loss": loss.tolist(),
    "iterations": iterations.tolist(),
    "share_right": right / sum(int((t != 255).sum()) for _, t in pairs),
    "areas": namespace["areas"],
    "maps": {k: [list(v.shape), float(abs(v).sum())] for k, v in namespace["found"].items()},
}, open("result.json", "w"))
"""


@pytest.fixture(scope="module")
def tour(project, tmp_path_factory):
    """What the notebook's cells left behind."""
    folder = tmp_path_factory.mktemp("tour")
    notebook = project / "demo/tour.ipynb"
    (folder / "temporary").mkdir()
    arguments = ("-c", EXECUTE, notebook, CHOSEN, SMALLER)
    run_python(*arguments, cwd=folder, TMPDIR=str(folder / "temporary"))
    yield json.loads((folder / "result.json").read_text())
    shutil.rmtree(folder / "temporary")


def test_ten_cells_run_and_leave_the_folder_alone(project, tour):
    assert tour["cells"] == 10
    assert "temporary" in tour["folder"].split(os.sep)
    assert sorted(entry.name for entry in (project / "demo").iterdir()) == ["tour.ipynb", "web"]
    assert len(tour["pictures"]) == 6
    assert min(min(size) for size in tour["pictures"]) >= 64


def test_the_backbone_is_the_papers(tour):
    assert tour["shapes"] == [[1, 96 * 2**i, 24 // 2**i, 32 // 2**i] for i in range(4)]
    parameters, flops = tour["cost"]
    assert parameters == pytest.approx(30.2e6, rel=0.01)
    assert flops == pytest.approx(4.91e9, rel=0.02)


def test_the_training_learns(tour):
    loss = tour["loss"]
    assert tour["iterations"][-1] == 80
    assert loss[-1] < 0.85 * loss[0]
    # Of 150 classes.
    assert tour["share_right"] > 0.1


def test_fields_and_maps_are_of_the_model(tour):
    assert all(0 < ratio < 1 for ratio in tour["areas"].values())
    assert tour["areas"]["before training"] != tour["areas"]["after training"]
    maps = [value for name, value in tour["maps"].items() if name.startswith("map_")]
    assert len(maps) >= 2
    for shape, total in maps:
        assert shape[0] == 4
        assert total > 0


def test_no_output_is_kept_in_the_notebook(project):
    """Outputs grow stale, and make every change of the file unreadable."""
    cells = json.loads((project / "demo/tour.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
