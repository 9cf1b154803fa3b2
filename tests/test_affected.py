"""The choice of tests for a change: what is imported, named and passed on, in a small project."""

import subprocess

import pytest
from affected import Uses, changed_files, select

FILES = {
    "mmvmamba/__init__.py": "",
    "mmvmamba/engine/__init__.py": "from mmvmamba.engine.reader import read",
    "mmvmamba/engine/reader.py": "def read():\n    from mmvmamba.engine import table",
    "mmvmamba/engine/table.py": "",
    "mmvmamba/engine/alone.py": "",
    "kernels/mmvmamba_kernels/__init__.py": "",
    "kernels/mmvmamba_kernels/scan/api.py": "BACKEND = f'{__package__}.fast'",
    "kernels/mmvmamba_kernels/scan/fast.py": "",
    "kernels/mmvmamba_kernels/extension.py": "",
    "kernels/mmvmamba_kernels/csrc/cpu/lanes.h": "",
    "tools/draw.py": "import mmvmamba.engine.table",
    "tools/run.sh": 'python "$HERE/draw.py"',
    "configs/_base_/schedule.py": "",
    "configs/one/one_a.py": "_base_ = '../_base_/schedule.py'",
    "configs/one/one_b.py": "_base_ = ['../_base_/schedule.py']",
    "configs/two/two.py": "_base_ = '../_base_/schedule.py'",
    "tests/conftest.py": "import mmvmamba.engine.table",
    "tests/kernels/test_cpp.py": "from mmvmamba_kernels import extension",
    "tests/kernels/test_scan.py": "import mmvmamba_kernels.scan.api",
    "tests/configs/test_configs.py": "from helper import load",
    "tests/engine/helper.py": "from mmvmamba.engine import read",
    "tests/engine/test_helped.py": "import helper",
    "tests/engine/test_reader.py": "'''Names mmvmamba.engine.alone in its documentation alone.'''",
    "tests/tools/test_draw.py": "TOOL = 'tools/draw.py'",
    "tests/tools/test_scripts.py": "def test(run):\n    run('run.sh')",
    "tests/tools/test_stem.py": "def test(tool):\n    tool('draw')",
}


@pytest.fixture
def uses(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Uses(tmp_path)


def test_distances_count_the_imports_between(uses):
    assert uses.distances(["mmvmamba/engine/table.py"]) == {
        "tests/tools/test_draw.py": 2,
        "tests/tools/test_stem.py": 2,
        "tests/configs/test_configs.py": 3,
        "tests/engine/test_helped.py": 3,
        "tests/tools/test_scripts.py": 3,
    }
    assert uses.distances(["mmvmamba/engine/alone.py"]) == {}
    assert (
        uses.distances(["kernels/mmvmamba_kernels/scan/fast.py"])["tests/kernels/test_scan.py"] == 0
    )


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        # By its name, though others import it.
        ("mmvmamba/engine/reader.py", ["tests/engine/test_reader.py"]),
        # A helper that is imported from another folder; that of the same name comes first.
        ("tests/engine/helper.py", ["tests/engine/test_helped.py"]),
        ("mmvmamba/engine/table.py", ["tests/tools/test_draw.py", "tests/tools/test_stem.py"]),
        ("tools/run.sh", ["tests/tools/test_scripts.py"]),
        ("kernels/mmvmamba_kernels/csrc/cpu/lanes.h", ["tests/kernels/test_cpp.py"]),
        ("tests/tools/test_stem.py", ["tests/tools/test_stem.py"]),
        ("mmvmamba/engine/alone.py", []),
        ("tests/conftest.py", []),
    ],
)
def test_the_nearest_tests_are_chosen(uses, changed, tests):
    chosen, left_out = select([changed], uses)
    assert sorted(chosen) == tests
    assert set(chosen.values()) <= {None}
    assert not chosen.keys() & left_out.keys()
    if changed == "tests/conftest.py":
        assert left_out.keys() == uses.tests


def test_a_config_is_tested_alone_and_a_base_by_an_heir_of_each_folder(uses):
    chosen, _ = select(["configs/two/two.py"], uses)
    assert chosen == {"tests/configs/test_configs.py": {"two"}}
    chosen, _ = select(["configs/_base_/schedule.py"], uses)
    assert chosen == {"tests/configs/test_configs.py": {"one_a", "two"}}


def test_changes_are_those_of_commits_files_and_new_files(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for name in ("same", "edited", "gone"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "edited").write_text("")
    (tmp_path / "gone").unlink()
    (tmp_path / "new one").write_text("")
    assert changed_files(root=tmp_path) == ["edited", "gone", "new one"]
    git("add", ".")
    git("commit", "-m", "second")
    assert changed_files(root=tmp_path) == []
    assert changed_files("HEAD~1", tmp_path) == ["edited", "gone", "new one"]
    with pytest.raises(ValueError, match="no comparison with 'nowhere'"):
        changed_files("nowhere", tmp_path)
