"""Imports go one way: tools -> mmvmamba -> mmvmamba_kernels -> torch.

Inside mmvmamba_kernels: operators -> backends -> what all operators share.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "mmvmamba_kernels"
# Package -> (its folder, first parts of module names that it must not import).
RULES = {
    "mmvmamba_kernels": (
        KERNELS,
        {"mmvmamba", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "tools"},
    ),
    "mmvmamba": (ROOT / "mmvmamba", {"tools", "tests"}),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", RULES)
def test_imports_go_one_way(package):
    folder, forbidden = RULES[package]
    files = [p for p in folder.rglob("*.py") if ".mim" not in p.parts]
    assert files
    for path in files:
        assert not packages(path) & forbidden, path


def test_kernels_stand_on_backends_and_those_on_what_is_shared():
    operators = {api.parent.name for api in KERNELS.glob("*/api.py")}
    assert operators
    # The commands that compile are no part of the operators.
    commands = ("__init__", "build", "precompile")
    shared = [p for p in KERNELS.glob("*.py") if p.stem not in commands]
    backends = list((KERNELS / "backends").rglob("*.py"))
    for files, forbidden in ((shared, operators | {"backends"}), (backends, operators)):
        assert files
        for path in files:
            names = {".".join(name.split(".")[:2]) for name in imported(path)}
            assert not names & {f"{KERNELS.name}.{name}" for name in forbidden}, path


def test_tools_import_no_sibling_tool():
    files = list((ROOT / "tools").rglob("*.py"))
    assert files
    for path in files:
        assert "tools" not in packages(path), path


def modules_imported(path: Path, known: set[str]) -> set[str]:
    """The modules of `known` that a file imports, at its top or in a function."""
    # What is imported from a package may be one of its modules.
    return {n if n in known else n.rpartition(".")[0] for n in imported(path)} & known


@pytest.mark.parametrize("package", RULES)
def test_no_two_modules_import_each_other(package):
    folder, _ = RULES[package]
    files = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
        for path in folder.rglob("*.py")
        if ".mim" not in path.parts and path.name != "__init__.py"
    }
    imports = {name: modules_imported(path, set(files)) for name, path in files.items()}
    assert sum(map(len, imports.values())) > len(files)
    # Raises CycleError, which names the modules.
    TopologicalSorter(imports).prepare()
