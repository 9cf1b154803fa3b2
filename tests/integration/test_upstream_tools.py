"""Other projects' commands and registries on our models."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import TASKS, run_python

CREATED = """
import sys
import mmvmamba
assert "timm" not in sys.modules
import timm, torch
with torch.device("meta"):
    model = timm.create_model("vmamba_tiny", features_only=True, out_indices=2, in_chans=1)
info = model.feature_info
print(info.channels(), info.reduction(), model.patch_embed[0].weight.shape[1])
"""


def test_timm_creates_the_backbone(tmp_path):
    pytest.importorskip("timm")
    done = run_python("-c", CREATED, cwd=tmp_path, tasks=False)
    assert done.stdout.splitlines()[-1] == "[384, 768] [16, 32] 1"


def test_get_flops_of_mmdet_counts_the_scans(project, sample_data, tmp_path):
    """mmsegmentation 1.2's fails with mmengine 0.10 before it comes to a model of any kind."""
    task = TASKS["mmdet"]
    tools = Path(find_spec("mmdet").origin).parent / ".mim/tools"
    data = f"val_dataloader.dataset.data_root={sample_data / task.data}/"
    options = (*task.options, data, "val_dataloader.persistent_workers=False")
    config = project / "configs" / task.config
    done = run_python(
        tools / "analysis_tools/get_flops.py", config, "--cfg-options", *options, cwd=tmp_path
    )
    assert re.search(r"Flops: [\d.]+[MG]\nParams: [\d.]+M", done.stdout)
    assert "Unsupported operator aten::" in done.stdout
    assert "Unsupported operator mmvmamba::" not in done.stdout
