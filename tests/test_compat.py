"""The check of the stack and the registrations that mmengine needs."""

import importlib.metadata
import sys

import numpy as np
import pytest
import torch
import warm
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from packaging.requirements import Requirement

from mmvmamba import compat


def test_the_installed_stack_fits():
    assert compat.stack_problems() == []


@pytest.mark.parametrize(
    ("package", "found"), [("mmcv", "2.2.0"), ("mmcv", "1.7.2"), ("mmengine", "0.11.0rc0")]
)
def test_a_wrong_version_is_named_with_the_command_that_mends_it(monkeypatch, package, found):
    real = importlib.metadata.version
    monkeypatch.setattr(compat, "version", lambda name: found if name == package else real(name))
    with pytest.raises(compat.StackError, match=f"{package} {found} is installed.*pip install"):
        compat.check_stack()


@pytest.mark.parametrize(("found", "warns"), [("2.14.9+cu130", False), ("2.15.0a0", True)])
def test_a_newer_torch_is_a_warning(monkeypatch, recwarn, found, warns):
    real = importlib.metadata.version
    monkeypatch.setattr(compat, "version", lambda name: found if name == "torch" else real(name))
    compat.check_stack()
    texts = [str(w.message) for w in recwarn]
    assert [f"torch {found} is newer" in text and "pip install" in text for text in texts] == (
        [True] if warns else []
    )


def test_only_required_packages_must_be_installed(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    assert compat.stack_problems() == []
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    with pytest.raises(compat.StackError, match=r"mmcv is not installed.*--no-build-isolation"):
        compat.check_stack()


def test_installing_replaces_nothing_of_the_stack():
    always = [
        Requirement(r).name for r in importlib.metadata.requires("mmvmamba") if "extra" not in r
    ]
    assert not set(always) & set(compat.STACK)


def test_mmengine_checkpoint_is_read_with_weights_only(tmp_path):
    buffer = HistoryBuffer([0.5, 0.25], [1, 1])
    path = tmp_path / "a.pth"
    torch.save({"hub": {"loss": buffer, "scalar": np.float64(2.5), "array": np.arange(3)}}, path)
    hub = torch.load(path, weights_only=True)["hub"]
    assert hub["loss"].mean() == pytest.approx(0.375)
    assert hub["scalar"] == 2.5
    np.testing.assert_array_equal(hub["array"], np.arange(3))


class AskForAttribute:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("name", ["__init__", "register_statistics", "update"])
def test_a_checkpoint_gets_no_other_attribute(tmp_path, name):
    path = tmp_path / "a.pth"
    torch.save(AskForAttribute(HistoryBuffer, name), path)
    with pytest.raises((ValueError, torch._weights_only_unpickler.UnpicklingError), match=name):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py",
        "upernet/upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py",
        "vmamba/vmamba-tiny-s1l8_8xb128_in1k.py",
    ],
)
def test_configs_are_found_by_package_name(tmp_path, name):
    child = tmp_path / "child.py"
    child.write_text(f"_base_ = 'mmvmamba::{name}'\n")
    assert Config.fromfile(child).model.backbone.type == "mmvmamba.VMamba"


def test_no_module_of_mmpretrain_is_imported_for_a_backbone():
    """mmpretrain takes seconds to import and is not every user's."""
    code = (
        "import sys; import mmvmamba.models; "
        "sys.exit(any(m.split('.')[0] in ('mmpretrain', 'mmdet', 'mmseg') for m in sys.modules))"
    )
    assert warm.run([sys.executable, "-c", code], tasks=False, timeout=120).returncode == 0
