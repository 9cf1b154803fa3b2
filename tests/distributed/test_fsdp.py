"""Fully sharded data parallelism: the same training, with a part of the weights in each process."""

import json
import sys

import pytest
from jobs import STEPS, TOLERANCE, curves, fault

from mmvmamba.engine.fsdp import BlockwiseFSDPStrategy

FSDP = (
    "runner_type=FlexibleRunner",
    "strategy.type=mmvmamba.BlockwiseFSDPStrategy",
)
BLOCKS = 4


def test_sharded(alone, arguments, train, start, project, tmp_path):
    """The losses are those of one process, and the checkpoint is one like any other."""
    work_dir = tmp_path / "sharded"
    line = arguments(work_dir, 2, *FSDP, recipe="unaugmented", hooks="dict(type='ShardRecorder')")
    (end,) = train(line, 2)
    assert end.code == 0, end.output[-4000:]
    assert curves(work_dir) == pytest.approx(alone("unaugmented"), rel=TOLERANCE)
    shards = json.loads((work_dir / "shards.json").read_text())
    # Each block, and all else together. Half of the numbers each, padded to whole ones.
    assert shards["units"] == BLOCKS + 1
    assert sum(shards["here"]) == shards["whole"]
    assert max(shards["here"]) < 0.51 * shards["whole"]

    checkpoint = work_dir / f"epoch_{STEPS}.pth"
    plain = arguments(tmp_path / "tested", 1, recipe="unaugmented")
    job = start(sys.executable, project / "tools/test.py", plain[0], checkpoint, *plain[1:])
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output[-4000:]
    assert "accuracy/top1" in output


@pytest.mark.slow
def test_sharded_and_resumed(alone, arguments, train, tmp_path):
    """A killed process is started again, with its part of the optimizer's state."""
    line = arguments(tmp_path, 2, *FSDP, recipe="unaugmented", hooks=fault("kill", 3))
    (end,) = train([*line, "--resume"], 2, MAX_RESTARTS="1")
    assert end.code == 0, end.output[-4000:]
    assert "restart 1 of 1" in end.output
    assert curves(tmp_path) == pytest.approx(alone("unaugmented"), rel=TOLERANCE)


def test_on_the_cpu_nothing_is_moved_to_the_cpu(monkeypatch):
    monkeypatch.setattr("mmvmamba.engine.fsdp.get_device", lambda: "cpu")
    strategy = BlockwiseFSDPStrategy()
    assert not strategy.state_dict_config.offload_to_cpu
    assert not strategy.optim_state_dict_config.offload_to_cpu
