"""The check of the stack and the registrations that mmengine needs."""

import importlib.metadata
import itertools
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import warm
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint
from packaging.requirements import Requirement
from stand_ins import stand_in, write_module

from mmvmamba import compat

OFFICIAL = {
    "mmengine": "0.10.7",
    "mmcv": "2.1.0",
    "mmdet": "3.3.0",
    "mmsegmentation": "1.2.2",
    "mmpretrain": "1.2.0",
}
ONEDL = {
    "onedl-mmengine": "0.10.12",
    "onedl-mmcv": "2.3.6",
    "onedl-mmdetection": "3.5.1",
    "onedl-mmsegmentation": "1.4.2",
    "onedl-mmpretrain": "1.3.6",
}


def test_the_installed_stack_fits():
    assert compat.stack_problems() == []


@pytest.mark.parametrize(
    ("package", "found"),
    [
        ("mmcv", "2.2.0"),
        ("mmcv", "1.7.2"),
        ("mmengine", "0.11.0rc0"),
        ("onedl-mmcv", "2.4.0"),
        ("onedl-mmengine", "0.10.8rc1"),
        ("onedl-mmpretrain", "2.0.0"),
    ],
)
def test_a_wrong_version_is_named_with_the_command_that_mends_it(
    monkeypatch, tmp_path, package, found
):
    stack = ONEDL if package in ONEDL else OFFICIAL
    stand_in(monkeypatch, tmp_path, *(stack | {package: found}).items())
    text = f"{package} {found} is installed, mmvmamba needs .*pip install .*{package}[>=]"
    with pytest.raises(compat.StackError, match=text) as caught:
        compat.check_stack()
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("stack", [OFFICIAL, ONEDL], ids=["official", "onedl"])
@pytest.mark.parametrize("number", [2, 5])
def test_both_stacks_are_known(monkeypatch, tmp_path, stack, number):
    """By what Python imports: the same files beside no metadata of a known name count too."""
    some = dict(list(stack.items())[:number])
    stand_in(monkeypatch, tmp_path, *some.items())
    assert compat.stack_problems() == []
    assert {compat.module_of(name): (name, version) for name, version in some.items()} == {
        module: compat.provider(module) for module in list(compat.MODULES)[:number]
    }
    assert (compat.stack() is compat.ONEDL) == (stack is ONEDL)
    for name in stack.keys() - some.keys():
        assert compat.stack_version(name) is None
        assert compat.install_command(compat.module_of(name)) == compat.stack()[name][1]
    assert compat.install_command("timm") == "pip install timm"


def test_a_distribution_of_another_name_is_known_by_its_module(monkeypatch, tmp_path):
    """mmcv-lite brings the module of mmcv; a checkout on the path brings no metadata."""
    stand_in(monkeypatch, tmp_path, *OFFICIAL.items())
    shutil.rmtree(tmp_path / "mmcv-2.1.0.dist-info")
    assert compat.stack_problems() == []
    write_module(tmp_path, "mmcv", "2.2.0")
    [problem] = compat.stack_problems()
    assert problem.startswith("mmcv 2.2.0 is installed, mmvmamba needs")


def test_what_is_left_of_a_package_is_none(monkeypatch, tmp_path):
    """A folder without files, and OneDL's files without the metadata that they read."""
    stand_in(monkeypatch, tmp_path, *ONEDL.items())
    (tmp_path / "mmcv/__init__.py").unlink()
    shutil.rmtree(tmp_path / "onedl_mmdetection-3.5.1.dist-info")
    problems = compat.stack_problems()
    assert [text.split(" is not installed")[0] for text in problems] == [
        "onedl-mmcv",
        "onedl-mmdetection",
    ]
    # pip believes that it is there.
    assert "pip uninstall -y onedl-mmcv && " in problems[0]


@pytest.mark.parametrize("over", [False, True], ids=["beside", "over"])
@pytest.mark.parametrize(
    ("stack", "name", "version"),
    [
        (ONEDL, "mmdet", "3.3.0"),
        (ONEDL, "mmengine", "0.10.7"),
        (ONEDL, "mmsegmentation", "1.2.2"),
        (OFFICIAL, "onedl-mmdetection", "3.5.1"),
        (OFFICIAL, "onedl-mmcv", "2.3.6"),
    ],
)
def test_a_mixture_is_named_and_refused(monkeypatch, tmp_path, stack, name, version, over):
    module = compat.module_of(name)
    [own] = [one for one in stack if compat.module_of(one) == module]
    before = [one for one in stack.items() if over or one[0] != own]
    stand_in(monkeypatch, tmp_path, *before, (name, version))
    with pytest.raises(compat.StackError) as caught:
        compat.check_stack()
    [_, line] = str(caught.value).splitlines()
    assert f"{name} {version}" in line
    if over:
        assert f"{own} {stack[own]}" in line
        assert f"overwrite each other's files ({module})" in line
    else:
        assert f"mmvmamba needs {own} " in line
    advised = line.partition(": ")[2] if over else line.rpartition(" here: ")[2]
    removed = re.search(r"pip uninstall -y ([^&]*) && ", advised)[1].split()
    assert set(removed) == ({name, own} if over else {name})
    assert re.search(rf"pip install .*\b{own}[>=]", advised)


def follow(command: str, installed: list[str]) -> None:
    """What a command of advice does to a list of installed distributions."""
    for part in command.split(" && "):
        words = part.replace('"', "").split()
        for word in words[words.index("pip") + 2 :]:
            name = re.split("[<>=]", word)[0]
            if "uninstall" in words and name in installed:
                installed.remove(name)
            elif "install" in words and not name.startswith("-") and name not in installed:
                installed.append(name)


def test_advice_ends_in_one_stack(monkeypatch, tmp_path):
    """From every mixture of the two: whatever is advised is followed once."""
    versions = OFFICIAL | ONEDL
    installed: list[str] = []

    def provider(module):
        here = [name for name in installed if compat.module_of(name) == module]
        return (here[-1], versions[here[-1]]) if here else None

    monkeypatch.setattr(compat, "provider", provider)
    monkeypatch.setattr(
        compat, "installed_version", lambda name: versions[name] if name in installed else None
    )
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    versions |= {"torch": "2.11.0", "setuptools": "80.0"}
    choices = [
        [(), (one,), (other,), (one, other), (other, one)] for one, other in compat.MODULES.values()
    ]
    mixed = 0
    for chosen in itertools.product(*choices):
        installed[:] = ["torch", "setuptools", *itertools.chain.from_iterable(chosen)]
        stack = compat.stack()
        problems = compat.stack_problems()
        mixed += bool(problems)
        for name in [one for one in stack if compat.stack_problem(one)]:
            follow(compat.stack_command(name), installed)
        assert compat.stack() is stack
        assert compat.stack_problems() == []
        assert set(installed) - {"torch", "setuptools"} <= stack.keys()
    assert mixed > 2000


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

    # OneDL's files have no version of their own.
    official = compat.stack() is compat.STACK
    monkeypatch.setattr(compat, "version", version)
    if official:
        assert compat.stack_problems() == []
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    with pytest.raises(compat.StackError, match=r"mmcv is not installed.*--no-build-isolation"):
        compat.check_stack()


def test_installing_replaces_nothing_of_the_stack():
    always = [
        Requirement(r).name for r in importlib.metadata.requires("mmvmamba") if "extra" not in r
    ]
    assert not set(always) & (set(compat.STACK) | set(compat.ONEDL))


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


class LeaveAMark:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_loader_that_falls_back_to_running_files_is_replaced(monkeypatch, tmp_path):
    """OneDL's mmengine has one, which all that reads a checkpoint from the disk goes through."""

    def load(file, map_location=None, weights_only=None):
        return torch.load(file, map_location=map_location, weights_only=False)

    monkeypatch.setattr(checkpoint, "_safe_torch_load", load, raising=False)
    mark, path = tmp_path / "mark", tmp_path / "a.pth"
    torch.save({"state_dict": {}, "evil": LeaveAMark(mark)}, path)
    checkpoint._safe_torch_load(path)
    assert mark.exists()
    mark.unlink()
    compat.read_weights_as_data()
    with pytest.raises(pickle.UnpicklingError, match="io.open"):
        checkpoint._safe_torch_load(path, map_location="cpu")
    assert not mark.exists()


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


def test_names_of_packages_are_found_on_onedls_stack(monkeypatch, tmp_path):
    """mmengine's table has OpenMMLab's distributions, which it would install."""
    table = config_utils.MODULE2PACKAGE
    for module in ("mmdet", "mmseg", "mmpretrain"):
        monkeypatch.setitem(table, module, "a-distribution-that-does-not-exist")
    stand_in(monkeypatch, tmp_path / "packages", *list(ONEDL.items())[:4])
    compat.register_config_scope()
    # What is not there is asked for by its own name.
    assert [table[name] for name in ("mmdet", "mmseg", "mmpretrain")] == [
        "mmdet",
        "mmseg",
        "onedl-mmpretrain",
    ]
    child = tmp_path / "child.py"
    child.write_text("_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'\n")
    assert Config.fromfile(child).model.type == "EncoderDecoder"


def test_no_module_of_mmpretrain_is_imported_for_a_backbone():
    """mmpretrain takes seconds to import and is not every user's."""
    code = (
        "import sys; import mmvmamba.models; "
        "sys.exit(any(m.split('.')[0] in ('mmpretrain', 'mmdet', 'mmseg') for m in sys.modules))"
    )
    assert warm.run([sys.executable, "-c", code], tasks=False, timeout=120).returncode == 0
