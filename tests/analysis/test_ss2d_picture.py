"""The picture that explains SS2D: its numbers are the scan's, and its command draws."""

import subprocess
import sys

import numpy as np
import pytest
import warm
from PIL import Image

from mmvmamba.analysis.scan_patterns import path_positions, paths_of
from mmvmamba.analysis.ss2d_picture import path_weights


@pytest.mark.parametrize("query", [(0, 0), (2, 3), (4, 6)])
def test_weights_decay_with_the_steps_along_each_path(query):
    height, width, decay = 5, 7, 0.11
    found = path_weights(height, width, query, decay)
    for weights, path in zip(found, paths_of("cross2d"), strict=True):
        order = path_positions(path, height, width)[0].tolist()
        end = order.index(query[0] * width + query[1])
        expected = np.zeros(height * width)
        for step, position in enumerate(order[: end + 1]):
            expected[position] = np.exp(-decay * (end - step))
        np.testing.assert_allclose(weights.ravel(), expected, rtol=1e-12)
    # Together, the four paths reach every position.
    assert (found.sum(axis=0) > 0).all()


def test_the_command_draws_on_a_users_image(project, tmp_path):
    def draw(*arguments: str) -> subprocess.CompletedProcess:
        tool = project / "tools/analysis_tools/draw_ss2d.py"
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return warm.run([sys.executable, tool, *arguments], cwd=tmp_path, timeout=120, **streams)

    Image.new("RGB", (30, 20), "green").save(tmp_path / "own.png")
    done = draw("own.png", "--grid", "3", "4", "--out", "new/out.png")
    assert done.returncode == 0, done.stdout
    assert min(Image.open(tmp_path / "new/out.png").size) > 300
    for arguments in (("none.png",), ("own.png", "--query", "8", "0")):
        done = draw(*arguments)
        assert done.returncode == 1
        assert arguments[0] in done.stdout or "query=(8, 0) is outside" in done.stdout
        assert "Traceback" not in done.stdout
