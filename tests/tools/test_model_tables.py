"""The READMEs' model tables are those of the metafiles, and the script that writes them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "tools/misc/make_model_tables.py"
spec = importlib.util.spec_from_file_location("make_model_tables", SCRIPT)
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

METAFILE = """
Models:
  - Name: one
    Config: configs/family/one.py
    Metadata: {Model: VMamba-T, Parameters: 30249064, FLOPs: 4910000000}
    Results: [{Metrics: {mIoU: 48.0}, Source: a paper}]
    Weights: https://example.com/one.pth
  - Name: two
    Config: configs/family/two.py
    Metadata: {Model: Other, Parameters: 1000000}
"""


@pytest.fixture
def project(tmp_path):
    family = tmp_path / "configs/family"
    family.mkdir(parents=True)
    (tmp_path / "model-index.yml").write_text("Import: [configs/family/metafile.yml]")
    (family / "metafile.yml").write_text(METAFILE)
    for folder, title in ((tmp_path, "# Project"), (family, "# The family")):
        text = f"{title}\nbefore\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
        (folder / "README.md").write_text(text)
    return tmp_path


def run(project, *options):
    command = [sys.executable, str(SCRIPT), "--project", str(project), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_projects_own_tables_are_current():
    done = run(PROJECT, "--check")
    assert done.returncode == 0, done.stderr


def test_tables_are_written_between_the_markers_and_then_current(project):
    stale = run(project, "--check")
    assert stale.returncode == 1
    assert str(project / "configs/family/README.md") in stale.stderr
    assert "make_model_tables.py" in stale.stderr
    assert "old" in (project / "README.md").read_text()

    assert run(project).returncode == 0
    text = (project / "configs/family/README.md").read_text()
    assert text.startswith(f"# The family\nbefore\n{tables.BEGIN}\n")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "| model | params (M) | FLOPs (G) | mIoU | source of the results | files |" in text
    assert (
        "| VMamba-T | 30.2 | 4.91 | 48.0 | a paper | [config](one.py), "
        "[weights](https://example.com/one.pth) |"
    ) in text
    assert "| Other | 1.0 | - | - | - | [config](two.py) |" in text
    overview = "| [family](configs/family/README.md) | The family | 2 | 1 | - |"
    assert overview in (project / "README.md").read_text()
    assert run(project, "--check").returncode == 0


def test_a_familys_main_results_stand_in_the_overview_when_all_three_sizes_have_them(project):
    family = project / "configs/family"
    models = [
        {
            "Metadata": {"Model": f"VMamba-{size}{note}", "Parameters": 1},
            "Config": "x.py",
            "Results": [{"Metrics": {"box AP": value}, "Source": "s"}],
        }
        for note, values in ((", 1x", (1, 2, 3)), (", 3x", (4, 5, 6)))
        for size, value in zip("TSB", values, strict=True)
    ]
    assert tables.overview_table({family: models}, project)[-1].endswith("| box AP 1 / 2 / 3 |")
    assert tables.overview_table({family: models[:2]}, project)[-1].endswith("| - |")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("configs/family/README.md", "# no markers", "must have these two lines"),
        ("configs/family/metafile.yml", "Models: [{Name: one}]", "lacks"),
        ("configs/family/metafile.yml", "Models: [", "expected"),
        ("model-index.yml", "Import: [configs/gone/metafile.yml]", "configs/gone/metafile.yml"),
    ],
)
def test_faults_are_named(project, file, text, message):
    (project / file).write_text(text)
    done = run(project)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
