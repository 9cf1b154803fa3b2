"""openmim finds configs, tools and weights of a wheel and of an editable install."""

import functools
import http.server
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml
from test_installs import install, make_environment, source  # noqa: F401 (a fixture)
from tiny import TASKS, command_line, run, run_python

TASK = TASKS["mmpretrain"]
NAME = Path(TASK.config).stem
# openmim and what it imports, without the packages that only its `--dataset` needs: those ask for
# old versions of others.
OPENMIM = (
    *("openmim==0.3.9", "colorama", "pandas", "python-dateutil", "six", "tabulate"),
    *("requests", "certifi", "charset-normalizer", "idna", "urllib3"),
)


@pytest.fixture(scope="module")
def openmim(tmp_path_factory) -> Path:
    """A folder with openmim, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("openmim")
    fetch = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
    done = run_python(*fetch, *OPENMIM, cwd=folder, check=False, cold=True)
    if done.returncode:
        pytest.skip(f"openmim cannot be fetched: {done.stdout[-300:]}")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder and the address under which it is served."""
    folder = tmp_path_factory.mktemp("weights")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def checkout(source, weights) -> Path:  # noqa: F811
    """A copy of the checkout whose index has one more model: the sample, with weights."""
    entry = {
        "Name": NAME,
        "In Collection": "VMamba",
        "Metadata": {"Epochs": 1},
        "Config": f"configs/{TASK.config}",
        "Weights": f"{weights[1]}/{TASK.last}",
    }
    (source / "configs/sample/metafile.yml").write_text(yaml.safe_dump({"Models": [entry]}))
    index = yaml.safe_load((source / "model-index.yml").read_text())
    index["Import"].append("configs/sample/metafile.yml")
    (source / "model-index.yml").write_text(yaml.safe_dump(index))
    return source


def mim(python: Path, openmim: Path, cwd: Path, *arguments: str | Path, check=True) -> str:
    """Runs a command of mim in an environment; gives its output."""
    # mim makes a folder for downloads in the home directory.
    variables = {"PYTHONPATH": str(openmim), "HOME": str(openmim)}
    return run(python, "-m", "mim", *arguments, cwd=cwd, check=check, **variables).stdout


def names(project: Path) -> set[str]:
    """The models of a checkout's metafiles."""
    index = yaml.safe_load((project / "model-index.yml").read_text())["Import"]
    files = (yaml.safe_load((project / path).read_text()) for path in index)
    return {model["Name"] for file in files for model in file["Models"]}


def assert_listed(output: str, project: Path) -> None:
    listed = yaml.safe_load(output[output.index("[") : output.rindex("]") + 1])
    assert set(listed) == names(project)


def test_in_a_wheel(checkout, weights, openmim, sample_data, tmp_path):
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run_python(*build, "-w", tmp_path / "wheels", checkout, cwd=tmp_path, cold=True)
    python = make_environment(tmp_path / "environment")
    install(python, next((tmp_path / "wheels").glob("mmvmamba-*.whl")))
    call = functools.partial(mim, python, openmim, tmp_path)

    assert_listed(call("search", "mmvmamba", "--valid-config"), checkout)

    arguments = command_line(TASK, Path(), sample_data, tmp_path / "out")[1:]
    call("train", "mmvmamba", f"{NAME}.py", "--gpus", "0", *arguments)
    trained = tmp_path / "out" / TASK.last
    assert trained.is_file()

    trained.rename(weights[0] / TASK.last)
    call("download", "mmvmamba", "--config", NAME, "--dest", tmp_path / "got")
    assert (tmp_path / "got" / TASK.last).stat().st_size > 1000
    config = tmp_path / "got" / f"{NAME}.py"
    checkpoint = ("--checkpoint", tmp_path / "got" / TASK.last)
    arguments = command_line(TASK, Path(), sample_data, tmp_path / "tested")[1:]
    output = call("test", "mmvmamba", config, *checkpoint, "--gpus", "0", *arguments)
    assert TASK.metric in output


def test_in_an_editable_install(checkout, openmim, tmp_path):
    python = make_environment(tmp_path / "environment")
    install(python, "-e", checkout)
    call = functools.partial(mim, python, openmim, tmp_path)

    assert_listed(call("search", "mmvmamba", "--valid-config"), checkout)

    (checkout / "configs/sample/edited.py").write_text("_base_ = './vmamba-sample_imagenet.py'")
    data = ("--data-root", "/nowhere")
    output = call("train", "mmvmamba", "edited.py", "--gpus", "0", *data, check=False)
    assert f"use {checkout}/configs/sample/edited.py" in " ".join(output.split())
    # The script ran, and read the config.
    assert "error: the train data set (ImageNet) is not there: /nowhere does not exist" in output

    # The names that other tools read from the metadata are still there.
    metadata = next((tmp_path / "environment").rglob("mmvmamba-*.dist-info"))
    assert {"mmvmamba", "mmvmamba_kernels"} <= set(
        (metadata / "top_level.txt").read_text().splitlines()
    )


def test_configs_can_be_found_by_their_file_name(project):
    files = Counter(
        path.name for path in (project / "configs").rglob("*.py") if "_base_" not in path.parts
    )
    assert [name for name, count in files.items() if count > 1] == []
