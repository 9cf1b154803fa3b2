"""The page of `python -m mmvmamba.demo` in a real browser, and what serves it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

onnx = pytest.importorskip("onnx", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxscript", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `deploy` is not installed")

import demo_pages  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from mmvmamba import demo  # noqa: E402
from mmvmamba.analysis.activation_maps import KINDS  # noqa: E402
from mmvmamba.analysis.pictures import items  # noqa: E402
from mmvmamba.analysis.scan_patterns import paths_of  # noqa: E402
from mmvmamba.deployment import export, record, scans  # noqa: E402
from mmvmamba.deployment.check import paste_mask  # noqa: E402
from mmvmamba.deployment.deployable import Deployable  # noqa: E402
from mmvmamba.deployment.runtimes import open_file  # noqa: E402
from mmvmamba.engine.cli import load_config  # noqa: E402
from mmvmamba.engine.errors import UsageError  # noqa: E402
from mmvmamba.engine.tasks import scope_of  # noqa: E402
from mmvmamba.models import VMamba  # noqa: E402

# Relative to the largest number, of maps: what docs/deployment.md has of a backbone's.
TOLERANCE = 1e-5


def test_resizes_are_those_of_mmcv(page):
    """Every byte: shrunk, enlarged and by half, both libraries."""
    import mmcv

    for before, after in (((61, 83), (40, 59)), ((20, 31), (47, 64)), ((40, 60), (20, 30))):
        pixels = demo_pages.noise(*before)
        for backend, interpolation in (
            ("cv2", "bilinear"),
            ("pillow", "bilinear"),
            ("pillow", "bicubic"),
        ):
            found = page.call(
                "resize.js",
                "Array.from(module.resize({data: Uint8Array.from(given.data), "
                "width: given.before[1], height: given.before[0]}, given.after[1], given.after[0], "
                "given.backend, given.interpolation).data)",
                {
                    "data": pixels.flatten().tolist(),
                    "before": before,
                    "after": after,
                    "backend": backend,
                    "interpolation": interpolation,
                },
            )
            expected = mmcv.imresize(
                pixels, after[::-1], interpolation=interpolation, backend=backend
            )
            np.testing.assert_array_equal(np.reshape(found, (*after, 3)), expected)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ("sample/vmamba-sample_imagenet.py", (70, 131)),
        ("vmamba/vmamba-tiny-s1l8_8xb128_in1k.py", (130, 97)),
        ("sample/upernet_vmamba-sample_ade20k.py", (90, 64)),
        pytest.param("sample/mask-rcnn_vmamba-sample_coco.py", (75, 121), marks=pytest.mark.slow),
    ],
)
def test_pictures_are_those_of_the_test_pipeline(page, project, tmp_path, config, size):
    cfg = load_config(str(project / "configs" / config))
    init_default_scope(scope_of(cfg))
    path = tmp_path / "picture.png"
    Image.fromarray(demo_pages.noise(*size)).save(path)
    [item] = items(cfg, None, [path], None)
    expected = item["inputs"].flip(0).permute(1, 2, 0).numpy()
    page.show(path)
    found = page.call(
        "pixels.js",
        "import('/app.js').then(({state}) => module.transform(state.picture, given))"
        ".then(({data, width, height}) => ({data: Array.from(data), width, height}))",
        json.loads(json.dumps(export.changing_steps(cfg))),
    )
    assert (found["height"], found["width"]) == expected.shape[:2]
    np.testing.assert_array_equal(np.reshape(found["data"], expected.shape), expected)


def the_record(**changes) -> record.Record:
    known = {
        "task": "mmseg",
        "config": "config.py",
        "classes": ["sky", "tree", "house"],
        "outputs": ["labels"],
        "channels": "RGB",
        "transforms": [{"type": "LoadImageFromFile"}],
        "size": None,
        "batched": True,
        "least": 8,
        "opset": 18,
        "versions": {},
    }
    return record.Record(**known | changes)


def written(folder: Path, kinds: list, nodes: list, **changes) -> list[Path]:
    """The files of a graph that takes images of any size.

    Args:
        folder: Where to write them.
        kinds: Name and type of each result.
        nodes: What computes them of `images`.
        **changes: Of the record.
    """
    info = onnx.helper.make_tensor_value_info
    images = info("images", onnx.TensorProto.FLOAT, [1, 3, "height", "width"])
    results = [info(name, kind, None) for name, kind in kinds]
    graph = onnx.helper.make_graph(nodes, "model", [images], results)
    opsets = [onnx.helper.make_opsetid("", export.OPSET)]
    path = folder / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    the_record(**changes).save(path)
    return [path, record.path_of(path)]


@pytest.fixture(scope="module")
def largest(tmp_path_factory) -> Path:
    """A segmentor whose labels are each pixel's largest channel."""
    node = onnx.helper.make_node("ArgMax", ["images"], ["labels"], axis=1, keepdims=0)
    folder = tmp_path_factory.mktemp("largest")
    return written(folder, [("labels", onnx.TensorProto.INT64)], [node])[0]


def test_a_segmentors_labels_are_shown(page, largest, tmp_path):
    pixels = demo_pages.noise(33, 47)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    page.open(largest, record.path_of(largest))
    page.show(tmp_path / "picture.png")
    labels = pixels.argmax(2)
    np.testing.assert_array_equal(page.numbers("labels")[0], labels)
    names = ["sky", "tree", "house"]
    for label, name in enumerate(names):
        assert f"{name}\t{100 * (labels == label).mean():.1f} %" in page.text("results")


def test_a_detectors_boxes_and_masks_are_shown(page, tmp_path):
    size = (45, 64)
    Image.fromarray(demo_pages.noise(*size)).save(tmp_path / "picture.png")
    found = {
        "boxes": np.array([[3.2, 5.1, 40, 31], [-4, 2, 9, 60], [1, 2, 3, 4]], np.float32),
        "scores": np.array([0.9, 0.5, 0.1], np.float32),
        "labels": np.array([2, 0, 1]),
        "masks": np.random.default_rng(0).random((3, 28, 28), dtype=np.float32),
    }
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in found.items()
    ]
    kinds = [(node.output[0], node.attribute[0].t.data_type) for node in nodes]
    changes = {"task": "mmdet", "outputs": list(found), "batched": False}
    page.open(*written(tmp_path, kinds, nodes, **changes))
    page.show(tmp_path / "picture.png")
    assert page.text("results").splitlines() == ["house\t90.0 %", "sky\t50.0 %"]
    pasted = page.page.evaluate(
        "Promise.all([import('/app.js'), import('/model.js')]).then(([{state}, model]) => "
        "model.instances(state.results, [], 0.3).map(({box, mask}) => "
        "Array.from(model.pasteMask(mask, box, state.image.width, state.image.height))))"
    )
    assert len(pasted) == 2
    for i, mask in enumerate(pasted):
        expected = paste_mask(*(torch.tensor(found[name][i]) for name in ("masks", "boxes")), size)
        np.testing.assert_allclose(np.reshape(mask, size), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": record.FORMAT + 1}, "has format 3, this page reads up to 2: update mmvmamba."),
        ({"task": "mmpose"}, "This page shows classifiers, segmentors, detectors; model.onnx.json"),
        (
            {"size": [40, 50]},
            "The model was made for images of 40x50 pixels, the picture has 33x47",
        ),
        ({"least": 64}, "The model takes images from 64 pixels, the picture has 33x47."),
        (
            {"transforms": [{"type": "LoadImageFromFile"}, {"type": "mmseg.ResizeToMultiple"}]},
            "This page cannot do the step ResizeToMultiple of the model's test pipeline",
        ),
        (
            {"transforms": [{"type": "CenterCrop", "crop_size": 9, "auto_pad": True}]},
            "This page cannot do CenterCrop with auto_pad=true of the model's test pipeline",
        ),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(page, largest, tmp_path, changes, message):
    Image.fromarray(demo_pages.noise(33, 47)).save(tmp_path / "picture.png")
    path = tmp_path / "model.onnx"
    shutil.copyfile(largest, path)
    the_record(**changes).save(path)
    page.show(tmp_path / "picture.png")
    page.open(path, record.path_of(path))
    assert page.text("error").startswith(message) or message in page.text("error")
    assert "\n" not in page.text("error")


def test_files_that_do_not_belong_together_are_told(page, largest, tmp_path):
    page.open(largest)
    assert page.text("error").startswith("model.onnx.json is missing: open it together with")
    page.open(record.path_of(largest))
    assert page.text("error") == "Open the model's .onnx file together with model.onnx.json."
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    page.open(tmp_path / "model.onnx", record.path_of(largest))
    assert page.text("error").startswith(f"onnxruntime-web {demo.VERSION} cannot open the model: ")
    page.open(tmp_path / "model.onnx")
    (tmp_path / "text.png").write_text("no picture")
    page.show(tmp_path / "text.png")
    assert page.text("error") == "text.png is no picture that this browser can read."


def test_browsers_without_webassembly_are_told(browser, address, largest):
    opened = browser.new_page()
    opened.add_init_script("delete window.WebAssembly")
    page = demo_pages.Page(opened, address)
    page.open(largest, record.path_of(largest))
    assert page.text("error").startswith("This browser has no WebAssembly")
    opened.close()


def test_the_pages_format_is_the_records(project):
    assert f"export const FORMAT = {record.FORMAT};" in (project / "demo/web/model.js").read_text()


def test_earlier_records_are_read(tmp_path):
    path = tmp_path / "model.onnx"
    the_record().save(path)
    content = json.loads(record.path_of(path).read_text())
    del content["scans"]
    record.path_of(path).write_text(json.dumps(content | {"format": 1}))
    assert record.Record.load(path).scans is None


BACKBONES = {
    "vanilla": {"d_state": 4, "ssm_ratio": 2.0, "gated": True, "stem": "v1", "downsample": "v1"},
    "mamba2": {"mixer": "mamba2", "d_state": 8, "dt_rank": 2, "act": "gelu", "init": "rand"},
    "cascade2d": {"scan": "cascade2d"},
    "bidi": {"scan": "bidi", "d_state": 2},
}


class Bare(Deployable):
    """A backbone as it is deployed, without a task."""

    def __init__(self, model: VMamba):
        torch.nn.Module.__init__(self)
        self.model, self.normalises, self.divisor, self.pad_value = model, False, 16, 0.0


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_scan_has_its_maps(page, name):
    """Of padded images too: the page's equation on what drives the scan, against the analysis."""
    torch.manual_seed(0)
    backbone = VMamba({"dims": 8, "depths": (2,), **BACKBONES[name]}).eval().requires_grad_(False)
    module = scans.Scans(Bare(backbone)).eval()
    image = torch.randn(1, 3, 50, 77)
    parts = dict(zip(scans.PARTS, module(image), strict=True))
    [mixed] = module.last_blocks(image)
    assert mixed.block == 2
    query, mamba2 = (7, 12), "mixer" in BACKBONES[name]
    paths = paths_of("cross2d" if mamba2 else mixed.mixer.scan)
    found = page.call(
        "maps.js",
        "Object.fromEntries(Object.entries(module.mapsOf(given.parts, given.paths, given.query))"
        ".map(([kind, {each}]) => [kind, each.map(({data}) => Array.from(data))]))",
        {
            "parts": {
                part: {"data": value.flatten().tolist(), "shape": list(value.shape)}
                for part, value in parts.items()
            },
            "paths": [path._asdict() for path in paths],
            "query": query,
        },
    )
    for kind in KINDS:
        expected = mixed.scan().maps(query, kind).flatten(1)
        largest = expected.abs().max().item()
        np.testing.assert_allclose(found[kind], expected, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.slow
@pytest.mark.skipif("DEMO_MODEL" not in os.environ, reason="DEMO_MODEL names no model to look at")
def test_looks(browser, tmp_path):
    """Keeps what docs/demo.md shows."""
    with demo_pages.served(tmp_path / "page", Path(os.environ["DEMO_MODEL"]).absolute()) as address:
        opened = browser.new_page(
            viewport={"width": 1000, "height": 800}, device_scale_factor=1.5, color_scheme="light"
        )
        page = demo_pages.Page(opened, address)
        opened.click("#sample")
        page.settle()
        # The pizza.
        box = opened.locator("#picture").bounding_box()
        opened.click("#picture", position={"x": 0.58 * box["width"], "y": 0.7 * box["height"]})
        page.settle()
        opened.select_option("#stage", "1")
        assert not page.faults
        opened.screenshot(
            path=os.environ.get("DEMO_PICTURE", tmp_path / "demo.png"), full_page=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_scan_is_exported(tmp_path, name):
    torch.manual_seed(0)
    backbone = VMamba({"dims": 8, "depths": (1, 1), **BACKBONES[name]}).eval().requires_grad_(False)
    module = scans.Scans(Bare(backbone)).eval()
    path = tmp_path / "scans.onnx"
    example = export.example_for(module, None, batched=False)
    export.write(export.trace(module, *example), path, "onnx")
    image = torch.randn(1, 3, 50, 77)
    for found, expected in zip(open_file(path)(image.numpy()), module(image), strict=True):
        error = np.abs(found - expected.numpy()).max() / expected.abs().max()
        assert error <= TOLERANCE


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no.onnx", "error: no.onnx does not exist (working directory: "),
        ("model.pt2", "error: model.pt2: the page runs ONNX files, which end in .onnx."),
    ],
)
def test_errors_are_a_line(argument, message):
    with pytest.raises(SystemExit) as stopped:
        demo.main([argument])
    assert str(stopped.value).startswith(message)


def test_what_the_page_needs_is_told_before_it_is_served(runtime, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"model\.onnx\.json is missing: copy it along"):
        demo.main([str(model), "--no-browser"])
    the_record().save(model)
    with pytest.raises(SystemExit, match="--out .* cannot be written: "):
        demo.main([str(model), "--out", str(model)])


def test_a_folder_is_written_for_other_servers(runtime, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo.main(["--fetch"])
    assert capsys.readouterr().out == f"onnxruntime-web {demo.VERSION}: {runtime}\n"
    demo.main(["--out", "site"])
    out = capsys.readouterr().out
    assert out.startswith("No model was given, and the quick start has not run here")
    assert {"index.html", "app.js", "ort", "model", "picture.jpg"} <= {
        path.name for path in (tmp_path / "site").iterdir()
    }


@pytest.fixture
def quick_start(tmp_path, monkeypatch) -> Path:
    """The folder of a quick start that has run, with a model that was exported later."""
    monkeypatch.chdir(tmp_path)
    demo.QUICK_START.mkdir(parents=True)
    (demo.QUICK_START / "trained").write_text("epoch_16.pth\n")
    for time, name in enumerate(("epoch_16.pth", demo.MODEL, "model.scans.onnx")):
        (demo.QUICK_START / name).write_bytes(b"nothing")
        os.utime(demo.QUICK_START / name, (time, time))
    return demo.QUICK_START


def test_the_quick_starts_detector_is_exported_once(quick_start):
    assert demo.quick_start_model() == quick_start / demo.MODEL


def test_an_interrupted_export_is_begun_again(quick_start, monkeypatch):
    (quick_start / "model.scans.onnx").unlink()
    commands = []

    def interrupted(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(UsageError, match="the quick start's detector could not be exported"):
        demo.quick_start_model()
    assert commands[0][-2:] == [quick_start / demo.MODEL, "--activation-maps"]


@pytest.mark.slow
def test_a_later_checkpoint_is_exported_again(quick_start, capfd):
    (quick_start / "epoch_16.pth").touch()
    with pytest.raises(UsageError, match="the quick start's detector could not be exported"):
        demo.quick_start_model()
    assert "epoch_16.pth" in capfd.readouterr().err


def fake_npm(folder: Path, script: str) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "the page needs onnxruntime-web, which npm downloads: install npm"),
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", r"\(npm error code ENOTFOUND\)"),
        ("echo other > it.tgz; echo it.tgz", "it.tgz is not onnxruntime-web .*: its sha512 is "),
    ],
)
def test_a_runtime_that_cannot_be_had_is_told(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if script:
        fake_npm(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    with pytest.raises(UsageError, match=message):
        demo.fetch_runtime()
    assert not list((tmp_path / "cache/mmvmamba").iterdir())
