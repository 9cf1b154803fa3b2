"""docs/building.md and docs/migrate.md, followed: their blocks run as they stand, but shorter."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tiny import TASKS, run_python, scalars

BUILDING, MIGRATE = "docs/building.md", "docs/migrate.md"
NECK = (
    *TASKS["mmseg"].options,
    *TASKS["mmseg"].images,
    "model.neck.in_channels=[16,32,64,128]",
    "model.neck.channels=16",
    "model.decode_head.in_channels=[16,16,16,16]",
    "model.auxiliary_head.in_channels=16",
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(project, sample_data, tmp_path) -> Path:
    """A folder with tools, configs, the sample data and the files that a page says to write."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(project / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(sample_data)
    for text in blocks(project / BUILDING, "python"):
        if name := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / name[1]).write_text(text)
    return tmp_path


def command(page: Path, program: str) -> list[str]:
    """The arguments of the page's one call of a program."""
    lines = "".join(blocks(page, "bash")).splitlines()
    (line,) = (line for line in lines if program in line)
    return shlex.split(line)[shlex.split(line).index("python") + 1 :]


def test_the_u_net_learns(project, place):
    *arguments, steps = command(project / BUILDING, "unet.py")
    assert int(steps) > 25
    said = run_python(*arguments, "25", cwd=place).stdout
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", said)]
    assert len(losses) == 3
    assert losses[-1] < 0.7 * losses[0]
    right = re.search(r"^(\S+)% of the validation images' labels are right$", said, re.MULTILINE)
    # One of 150 classes by chance.
    assert float(right[1]) > 10
    (code,) = (text for text in blocks(project / BUILDING, "python") if "class UNet" in text)
    assert len(code.splitlines()) <= 72


def test_the_neck_trains_in_a_segmentor(project, place):
    path = os.pathsep.join(filter(None, [".", os.environ.get("PYTHONPATH")]))
    arguments = command(project / BUILDING, "tools/train.py")
    run_python(*arguments, "--cfg-options", *NECK, cwd=place, PYTHONPATH=path)
    log = scalars(place / "work_dirs/my_segmentor")
    assert "mIoU" in log[-1]
    assert all(entry["loss"] > 0 for entry in log[:-1])


def test_imports_and_calls_of_the_pages(project):
    """The blocks that are neither files nor in need of tensors."""
    batch, channels, states, length = 2, 6, 3, 10
    shape = (batch, channels, length)
    given = {
        **{name: torch.randn(shape) for name in ("u", "delta", "z")},
        **{name: torch.randn(batch, states, length) for name in ("B", "C")},
        **{name: torch.randn(channels) for name in ("D", "bias")},
        "A": -torch.rand(channels, states),
    }
    finders = list(sys.meta_path)
    try:
        for page in (BUILDING, MIGRATE):
            for text in blocks(project / page, "python"):
                if not re.match(r"# \w+\.py\n", text):
                    names = dict(given)
                    exec(text, names)
                    if "block" in names:
                        assert names["block"](torch.randn(1, 5, 7, 96)).shape == (1, 5, 7, 96)
                    if "y" in names:
                        check_scan(names["y"], given)
    finally:
        sys.meta_path[:] = finders


def check_scan(y, given):
    """What the page's comment calls gives the same."""
    interface = importlib.import_module("mmvmamba_kernels.stand_in.mamba_interface")
    values = {name: value for name, value in given.items() if name != "bias"}
    expected = interface.selective_scan_fn(**values, delta_bias=given["bias"], delta_softplus=True)
    torch.testing.assert_close(y, expected)


SCRIPT = """
import sys, torch
from derived_models import UNet
torch.manual_seed(0)
model = UNet()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
losses = []
for _ in range(2):
    loss = model(torch.ones(1, 1, 16, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(sys.argv[1:], losses[1] < losses[0])
"""


def test_a_derived_network_trains_through_the_stand_ins(project, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    models = project / "tests/kernels/derived_models.py"
    (tmp_path / "derived_models.py").write_text(models.read_text())
    arguments = command(project / MIGRATE, "mmvmamba_kernels.stand_in")
    said = run_python(*arguments, cwd=tmp_path).stdout
    assert said.splitlines()[-1] == "['--its', '--options'] True"
