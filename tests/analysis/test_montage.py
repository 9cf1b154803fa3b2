"""One picture out of a test run's pictures."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the montage is drawn with matplotlib")

from mmvmamba.analysis.montage import draw_montage, newest_pictures

TOOL = Path(__file__).parents[2] / "tools/analysis_tools/show_predictions.py"


def write_pictures(folder: Path, count: int, when: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        picture = np.full((60, 160, 3), 40 * index, np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.jpg")
        os.utime(folder / f"{index}.jpg", (when, when))


def test_newest_run_is_found(tmp_path):
    write_pictures(tmp_path / "20260101/vis", 3, when=1_000)
    write_pictures(tmp_path / "20260102/vis", 5, when=2_000)
    found = newest_pictures(tmp_path, 4)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        f"20260102/vis/{index}.jpg" for index in range(4)
    ]


def test_no_pictures_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--show-dir"):
        newest_pictures(tmp_path, 4)


def test_montage_shows_every_picture(tmp_path):
    write_pictures(tmp_path / "vis", 5, when=1_000)
    out_file = tmp_path / "out/montage.png"
    draw_montage(newest_pictures(tmp_path / "vis", 5), out_file, columns=3, title="Sample")
    pixels = np.asarray(Image.open(out_file).convert("L"))
    values, counts = np.unique(pixels, return_counts=True)
    large = set(values[counts > 0.1 * pixels.size].tolist())
    assert {0, 40, 80, 120, 160} <= large


@pytest.mark.parametrize(
    ("pictures", "columns", "message"), [([], 3, "at least one"), (["a.png"], 0, "columns")]
)
def test_montage_refuses_nonsense(tmp_path, pictures, columns, message):
    with pytest.raises(ValueError, match=message):
        draw_montage(pictures, tmp_path / "out.png", columns=columns)


def test_command_line(tmp_path):
    write_pictures(tmp_path / "vis", 2, when=1_000)
    command = [sys.executable, str(TOOL), "vis", "predictions.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predictions.png").stat().st_size > 0
    command[2] = "nowhere"
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    assert "no picture" in failed.stderr
    assert "Traceback" not in failed.stderr
