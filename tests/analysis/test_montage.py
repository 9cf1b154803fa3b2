"""One picture out of several."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the montage is drawn with matplotlib")

from mmvmamba.analysis.montage import draw_montage


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True)
    files = [folder / f"{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        Image.fromarray(np.full((60, 160, 3), 40 * index, np.uint8)).save(file)
    return files


def test_montage_shows_every_picture(tmp_path):
    out_file = tmp_path / "out/montage.png"
    draw_montage(write_pictures(tmp_path / "vis", 5), out_file, columns=3, title="Sample")
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
