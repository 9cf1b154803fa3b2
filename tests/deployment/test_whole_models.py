"""Whole models as a user exports them: equal to OpenMMLab's, in runtimes and in the browser."""

import contextlib
import functools
import io
import json
import runpy
import shutil
import subprocess
import sys
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

onnx = pytest.importorskip("onnx", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxscript", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `deploy` is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

import demo_pages  # noqa: E402
import small  # noqa: E402
import tiny  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

from mmvmamba.analysis.activation_maps import KINDS, capture  # noqa: E402
from mmvmamba.analysis.pictures import items  # noqa: E402
from mmvmamba.analysis.scan_patterns import path_name, paths_of  # noqa: E402
from mmvmamba.deployment import check, export, record, runtimes, scans  # noqa: E402
from mmvmamba.engine.cli import load_config  # noqa: E402
from mmvmamba.engine.errors import UsageError  # noqa: E402
from mmvmamba.engine.tasks import scope_of  # noqa: E402
from mmvmamba_kernels.backends.native import build  # noqa: E402

# Relative to the largest number, of maps: what docs/deployment.md has of a backbone's.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Whole:
    """What the command line exported.

    Attributes:
        cfg: The config.
        checkpoint: Its weights.
        pictures: Those that were compared.
        path: The file.
        program: What was traced for it.
        said: What the command line printed.
    """

    cfg: Config
    checkpoint: str
    pictures: list[Path]
    path: Path
    program: torch.export.ExportedProgram
    said: str

    def pixels(self) -> np.ndarray:
        """What the model takes of the first picture."""
        init_default_scope(scope_of(self.cfg))
        [item] = items(self.cfg, None, self.pictures[:1], None)
        return record.Record.load(self.path).pixels(item["inputs"])


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory):
    """By name, a small model that was exported and compared with OpenMMLab's test step, once.

    Of one size, which takes a fraction of the exporter's time.
    """

    @functools.cache
    def exported(name: str) -> Whole:
        folder = tmp_path_factory.mktemp(name)
        cfg, checkpoint = small.make(name, project, folder)
        size, options = small.SIZE, ()
        if name == "classifier":
            # Its pipeline cuts pictures to this size.
            size, options = (96, 96), ("--activation-maps",)
        else:
            small.resize(cfg, size)
        cfg.dump(folder / "config.py")
        path, pictures = folder / "model.onnx", small.pictures(folder)
        command = [folder / "config.py", checkpoint, path, "--size", *size, *options]
        tool = runpy.run_path(str(project / "tools/deployment/export.py"))
        programs, trace = [], export.trace

        def remember(*arguments):
            programs.append(trace(*arguments))
            return programs[-1]

        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            patch.setattr(export, "trace", remember)
            command = ["export.py", *command, "--check", *pictures]
            patch.setattr(sys, "argv", [str(part) for part in command])
            # Room for the table.
            patch.setenv("COLUMNS", "200")
            # It fails where they differ.
            tool["main"]()
        cfg = Config.fromfile(folder / "config.py")
        return Whole(cfg, str(checkpoint), pictures, path, programs[0], out.getvalue())

    return exported


@pytest.mark.parametrize("name", ["classifier", "upernet", "mask-rcnn"])
def test_the_command_line_compares_with_openmmlabs_test_step(whole, name):
    found = whole(name)
    assert "onnxruntime differs by" in found.said
    assert all(picture.name in found.said for picture in found.pictures)
    assert "initializer" not in found.said
    onnx.checker.check_model(found.path)


def test_record_says_what_the_file_takes_and_gives(whole):
    found = json.loads(record.path_of(whole("classifier").path).read_text())
    assert found["format"] == record.FORMAT
    assert found["task"] == "mmpretrain"
    assert found["classes"][:2] == ["class 0", "class 1"]
    assert found["channels"] == "RGB"
    assert found["size"] == [96, 96]
    assert found["outputs"] == ["probabilities"]
    assert found["custom_op"] is False
    assert [step["type"] for step in found["transforms"]] == [
        "LoadImageFromFile",
        "ResizeEdge",
        "CenterCrop",
    ]


def test_scans_are_operators_of_the_cpp_kernels(whole, tmp_path):
    """One for each block, in a library that a process without PyTorch can register."""
    library = build.build_onnxruntime()
    assert b"libtorch" not in library.read_bytes()
    classifier = whole("classifier")
    path = tmp_path / "model.onnx"
    export.write(classifier.program, path, "onnx", ["probabilities"], custom_op=True)
    nodes = [node for node in onnx.load(path).graph.node if node.domain]
    assert [(node.domain, node.op_type) for node in nodes] == [("mmvmamba", "SelectiveScan2d")] * 2
    [found] = runtimes.open_file(path, threads=2, custom_op=True)(classifier.pixels())
    [expected] = runtimes.open_file(classifier.path)(classifier.pixels())
    assert np.abs(found - expected).max() <= TOLERANCE * expected.max()
    with pytest.raises(UsageError, match=r"cannot open .*SelectiveScan2d"):
        runtimes.open_file(path)


def test_products_of_bytes_are_smaller_and_near(whole, tmp_path):
    from mmvmamba.deployment.quantize import quantize

    classifier, out = whole("classifier"), tmp_path / "model.onnx"
    for path_of in (Path, record.path_of):
        shutil.copyfile(path_of(classifier.path), path_of(out))
    quantize(classifier.cfg, out, classifier.pictures)
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    deployed = runtimes.Deployed(out)
    for one in check.compare(classifier.cfg, classifier.checkpoint, deployed, classifier.pictures):
        # Of random weights, which keep less than trained ones of what 256 steps lose.
        assert 0 < one.error < 0.3


def test_a_classifiers_numbers_are_pythons(browser, whole, tmp_path):
    """Served, on a picture that is opened; and a click gives the maps of the analysis."""
    classifier = whole("classifier")
    with demo_pages.served(tmp_path, classifier.path) as address:
        page = demo_pages.Page(browser.new_page(), address)
        assert "A classifier, config.py. Open a picture." in page.text("status")
        page.show(classifier.pictures[0])
        assert page.text("status").endswith(" ms.")
        pixels = classifier.pixels()
        expected = runtimes.Deployed(classifier.path)(pixels)["probabilities"]
        np.testing.assert_allclose(page.numbers("probabilities"), expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 0.01
        best = int(expected.argmax())
        assert page.text("results").splitlines()[0].startswith(f"class {best}")
        assert f"{100 * expected.max():.1f} %" in page.text("results")

        page.page.click("#picture", position={"x": 150, "y": 210})
        page.settle()
        wide = page.page.locator("#picture").bounding_box()["width"]
        query = page.state("state.query")
        assert query == [int(210 / wide * 96), int(150 / wide * 96)]
        model = export.load(classifier.cfg, classifier.checkpoint).module
        image = model.normalised(torch.from_numpy(pixels))[0]
        blocks = {mixed.stage: mixed for mixed in capture(export.backbone_of(model), image)}
        assert page.page.locator("#stage option").all_inner_texts() == ["1, block 1", "2, block 1"]
        for i, mixed in enumerate(blocks.values()):
            page.page.select_option("#stage", str(i))
            cell = tuple(at * n // 96 for at, n in zip(query, mixed.x.shape[1:3], strict=True))
            check_maps(page, mixed.scan(), cell)
        assert page.page.locator("#paths figcaption").all_inner_texts() == [
            path_name(path) for path in paths_of("cross2d")
        ]
        assert page.text("sum-caption").startswith(
            "All paths, 12 \u00d7 12 positions. The brightest is "
        )
        assert not page.faults


def check_maps(page: demo_pages.Page, scan, cell: tuple[int, int]) -> None:
    found = page.state(
        "Object.fromEntries(Object.entries(state.maps).map(([kind, {each, sum}]) => "
        "[kind, [...each, sum].map(({data}) => Array.from(data))]))"
    )
    for kind in KINDS:
        expected = scan.maps(cell, kind).flatten(1)
        expected = torch.cat([expected, expected.sum(0, keepdim=True)])
        error = (torch.tensor(found[kind]) - expected).abs().amax(1) / expected.abs().amax(1)
        assert error.max() <= TOLERANCE, kind


def test_a_segmentors_numbers_are_pythons(page, whole):
    segmentor = whole("upernet")
    page.open(segmentor.path, record.path_of(segmentor.path))
    page.show(segmentor.pictures[0])
    expected = runtimes.Deployed(segmentor.path)(segmentor.pixels())["labels"]
    found = page.numbers("labels")
    assert found.shape == expected.shape
    # One pixel may have two classes that differ in the last digit.
    assert (found != expected).mean() <= 1e-4
    labels, counts = np.unique(found, return_counts=True)
    assert len(labels) > 1
    names = json.loads(record.path_of(segmentor.path).read_text())["classes"]
    for label, count in zip(labels, counts, strict=True):
        name = names[label] if label < len(names) else f"class {label}"
        assert f"{name}\t{100 * count / found.size:.1f} %" in page.text("results")


def test_a_detectors_numbers_are_pythons(page, whole):
    detector = whole("mask-rcnn")
    page.open(detector.path, record.path_of(detector.path))
    page.show(detector.pictures[0])
    expected = runtimes.Deployed(detector.path)(detector.pixels())
    assert list(expected) == ["boxes", "scores", "labels", "masks"]
    for output, value in expected.items():
        found = page.numbers(output)
        # What rounding errors become in untrained heads.
        assert np.abs(found - value).max() <= 1e-4 * max(np.abs(value).max(), 1), output
    shown = expected["scores"] >= 0.3
    assert shown.any()
    assert page.text("results").splitlines() == [
        f"class {label}\t{100 * score:.1f} %"
        for label, score in zip(expected["labels"][shown], expected["scores"][shown], strict=True)
    ]


def test_a_model_is_opened_from_files(page, whole):
    """As the sample picture is, and in any order; without the scans there are no maps."""
    path = whole("classifier").path
    page.load()
    page.page.click("#sample")
    page.settle()
    assert page.text("status") == "Open a model."
    page.open(record.path_of(path), path)
    assert page.text("status").startswith("A classifier, ")
    assert page.text("status").endswith(" ms.")
    assert page.page.is_hidden("#maps")
    page.open(record.scans_path(path), path, record.path_of(path))
    assert page.page.is_visible("#maps")


def test_files_are_dropped_on_the_page(page, whole):
    """A picture, then a model; and what is no file changes nothing."""
    classifier = whole("classifier")
    page.load()
    page.drop(classifier.pictures[0])
    assert page.text("status") == "Open a model."
    size = page.state("[state.picture.height, state.picture.width]")
    assert size == list(Image.open(classifier.pictures[0]).size)[::-1]
    path = classifier.path
    page.drop(record.scans_path(path), path, record.path_of(path))
    assert page.text("status").startswith("A classifier, ")
    assert page.page.is_visible("#maps")
    expected = runtimes.Deployed(path)(classifier.pixels())["probabilities"]
    np.testing.assert_allclose(page.numbers("probabilities"), expected, rtol=0, atol=1e-6)


def test_the_command_serves_the_page(whole, runtime, tmp_path):
    """A real process, whose answers a browser takes."""
    path = whole("classifier").path
    with subprocess.Popen(
        [sys.executable, "-m", "mmvmamba.demo", path, "--no-browser"],
        cwd=tmp_path,
        env=tiny.clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            address = process.stdout.readline().split()[0]
            for name, kind in (
                ("", "text/html"),
                ("app.js", "text/javascript"),
                ("ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
                ("model/model.scans.onnx", "application/octet-stream"),
            ):
                with urllib.request.urlopen(address + name) as answer:
                    assert answer.headers["Content-Type"].split(";")[0] == kind
                    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(small.CONFIGS))
@pytest.mark.parametrize(
    ("kind", "size", "stages"),
    [
        ("onnx", None, 2),
        ("onnx", None, 4),
        ("openvino", None, 2),
        ("pt2", None, 2),
        ("onnx", small.SIZE, 2),
        ("openvino", small.SIZE, 2),
    ],
)
def test_all_equal_openmmlabs_in_all_formats(name, kind, size, stages, project, tmp_path):
    """OpenMMLab's own test step, with its processing, at two sizes or the one that is given."""
    cfg, checkpoint = small.make(name, project, tmp_path, stages)
    pictures = small.pictures(tmp_path)
    if size is not None:
        pictures = pictures[:1]
        small.resize(cfg, size)
    out = tmp_path / f"model{export.FORMATS[kind]}"
    given = export.export_model(export.load(cfg, str(checkpoint)), out, kind, size)
    assert given.size == (size and list(size))
    deployed = runtimes.Deployed(out, threads=1)
    for one in check.compare(cfg, str(checkpoint), deployed, pictures):
        warnings.warn(f"{name}, {kind}, {size}, {stages}: {one.difference}", stacklevel=1)
        assert one.error <= 1e-4, one


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tiny.TASKS))
def test_metrics_equal_openmmlabs(name, project, sample_data, tmp_path):
    """The tool fails where one differs."""
    task = tiny.TASKS[name]
    training = tiny.command_line(task, project, sample_data, tmp_path)
    tiny.run_python(project / "tools/train.py", *training, cwd=tmp_path)
    # The exported segmentor labels the image that it is given: in its own size.
    options = ["--cfg-options", "test_dataloader.dataset.pipeline.1.scale=(96,72)"]
    done = tiny.run_python(
        *(project / "tools/deployment/export.py", tmp_path / Path(task.config).name),
        *(tmp_path / task.last, tmp_path / "model.onnx", "--evaluate"),
        *(options if name == "mmseg" else []),
        cwd=tmp_path,
        COLUMNS="200",
    )
    assert task.metric in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tiny.TASKS))
def test_the_sample_configs_run_in_the_page(page, project, tmp_path, name):
    """With random weights, on the sample picture, whose file is a JPEG."""
    task = tiny.TASKS[name]
    cfg = load_config(str(project / "configs" / task.config))
    init_default_scope(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    small.make_results_differ(model)
    checkpoint, path = str(tmp_path / "model.pth"), tmp_path / "model.onnx"
    meta = {"dataset_meta": {"classes": [f"class {i}" for i in range(1000)]}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, checkpoint)
    loaded = export.load(cfg, checkpoint)
    given = export.export_model(loaded, path, "onnx")
    scans.export_scans(loaded.module, path, given)
    page.page.click("#sample")
    page.settle()
    page.open(path, record.path_of(path), record.scans_path(path))
    assert page.text("status").endswith(" ms."), page.text("error")
    image = page.state("[state.image.height, state.image.width, Array.from(state.image.data)]")
    pixels = torch.tensor(image[2], dtype=torch.float32).reshape(*image[:2], 3).permute(2, 0, 1)
    [item] = items(cfg, None, [project / "demo/web/picture.jpg"], None)
    steps = (pixels.flip(0) - item["inputs"]).abs()
    warnings.warn(f"{name}: JPEG differs by {steps.max()}, {steps.mean():.3f}", stacklevel=1)
    assert steps.mean() < 1
    expected = runtimes.Deployed(path)(given.pixels(pixels.flip(0)))
    for output, value in expected.items():
        found = page.numbers(output)
        assert found.shape == value.shape
        if output == "labels" and name == "mmseg":
            assert (found != value).mean() < 1e-4
        else:
            assert np.abs(found - value).max() <= 1e-4 * np.abs(value).max(), output
    page.page.click("#picture", position={"x": 100, "y": 100})
    page.settle()
    assert page.page.locator("#paths figure").count() == 4
