"""Exported backbones and whole models: small, standard, and equal to the originals."""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxscript", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `deploy` is not installed")
pytest.importorskip("openvino", reason="the extra `deploy` is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

import tiny  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from mmvmamba.deployment import export, runtimes  # noqa: E402
from mmvmamba.deployment.models import deployable  # noqa: E402
from mmvmamba.deployment.record import FORMAT, Record, path_of  # noqa: E402
from mmvmamba.engine.errors import UsageError  # noqa: E402
from mmvmamba.models import VMamba  # noqa: E402
from mmvmamba.registry import MODELS  # noqa: E402

# Of maps against eager float32, relative to the largest number: what issue and docs promise.
TOLERANCE = 1e-5
SMALL = {"dims": 16, "depths": (1, 1)}
VANILLA = {
    **SMALL,
    "d_state": 4,
    "ssm_ratio": 2.0,
    "gated": True,
    "dwconv_bias": True,
    "mlp_ratio": 0.0,
    "stem": "v1",
    "downsample": "v1",
}
MAMBA2 = {**SMALL, "mixer": "mamba2", "d_state": 8, "dt_rank": 2, "act": "gelu", "init": "rand"}
# Every arch and scan pattern, the sizes of the three tasks, and one with odd sides.
ARCHS = tuple(VMamba.arch_settings)
SCANS = ("unidi", "bidi", "cascade2d")
SIZES = ((224, 224), (512, 512), (800, 1280), (33, 1025))


def backbone(arch, **options) -> VMamba:
    torch.manual_seed(0)
    return VMamba(arch, **options).eval().requires_grad_(False)


def exported(model: torch.nn.Module, folder: Path, kinds: tuple[str, ...]):
    """What runs a backbone in other runtimes."""
    program = export.to_onnx(export.trace(model, *export.example_for(model, None, True)), None)
    for kind in kinds:
        path = folder / f"model{export.FORMATS[kind]}"
        program.save(path) if kind == "onnx" else export.write_openvino(program, path)
        yield runtimes.open_file(path, threads=torch.get_num_threads())


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def errors(run, model: torch.nn.Module, batch: torch.Tensor) -> list[float]:
    with torch.no_grad():
        expected = model(batch)
    found = [torch.from_numpy(array) for array in run(batch.numpy())]
    assert [f.shape for f in found] == [e.shape for e in expected]
    return [
        ((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected, strict=True)
    ]


def check_at_any_size(run, model: VMamba) -> None:
    # One image and several, wide and high, odd.
    for shape in ((1, 3, 48, 64), (3, 3, 67, 30)):
        assert max(errors(run, model, images(*shape))) <= TOLERANCE


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        pytest.param(VANILLA, {}, id="vanilla"),
        pytest.param(MAMBA2, {}, id="mamba2"),
        pytest.param(SMALL, {"scan": "cascade2d"}, id="cascade", marks=SLOW),
        pytest.param(
            SMALL | {"downsample": "v2"},
            {"scan": "bidi", "norm": "bn", "d_state": 2},
            id="bidi",
            marks=SLOW,
        ),
    ],
)
def test_backbones_equal_eager_ones_at_any_size(tmp_path, arch, options):
    model = backbone(arch, **options)
    for run in exported(model, tmp_path, ("onnx", "openvino")):
        check_at_any_size(run, model)


@pytest.fixture(scope="module")
def small() -> tuple[VMamba, torch.export.ExportedProgram]:
    model = backbone(SMALL)
    return model, export.trace(model, *export.example_for(model, None, True))


def all_nodes(part) -> Iterator:
    """The nodes of a graph or a function, those in the bodies of its loops too."""
    for node in part.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def check_graph(path: Path, blocks: int) -> None:
    """Standard operators alone, and each function written once and called by every block."""
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    nodes = [node for part in (graph.graph, *graph.functions) for node in all_nodes(part)]
    # VMamba-T's; the one public graph of it has 70,386.
    assert len(nodes) <= 2500
    functions = {function.name for function in graph.functions}
    assert len(functions) == len(graph.functions)
    assert {node.domain for node in nodes} <= {"", "mmvmamba"}
    assert {node.op_type for node in nodes if node.domain} == functions
    called = [node.op_type for node in graph.graph.node]
    assert called.count("ScanOfOneState") == called.count("CrossMerge") == blocks
    assert {opset.domain: opset.version for opset in graph.opset_import}[""] == export.OPSET


def test_graph_is_standard_and_small(tmp_path, small):
    model, program = small
    path = tmp_path / "model.onnx"
    export.write(program, path, "onnx")
    check_graph(path, blocks=2)
    check_at_any_size(runtimes.open_file(path, threads=1), model)


@pytest.mark.slow
def test_graph_of_vmamba_t_is_small(tmp_path):
    list(exported(backbone("tiny"), tmp_path, ("onnx",)))
    check_graph(tmp_path / "model.onnx", blocks=14)


def test_pt2_file_runs_with_the_kernels_alone(tmp_path, small):
    model, program = small
    export.write(program, tmp_path / "model.pt2", "pt2")
    batch = images(1, 3, 40, 52)
    np.save(tmp_path / "images.npy", batch.numpy())
    code = """
import sys, numpy, torch, mmvmamba_kernels
module = torch.export.load("model.pt2").module()
with torch.no_grad():
    maps = module(torch.from_numpy(numpy.load("images.npy")))
assert not {name.split(".")[0] for name in sys.modules} & {"mmvmamba", "mmengine"}
numpy.savez("maps.npz", *(m.numpy() for m in maps))
"""
    tiny.run_python("-c", code, cwd=tmp_path, tasks=False, cold=True)
    found = np.load(tmp_path / "maps.npz")
    with torch.no_grad():
        for one, expected in zip(found.values(), model(batch), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), expected, rtol=0, atol=1e-5)


def saved(task: tiny.Task, project: Path, folder: Path) -> tuple[list[str], Path]:
    """A task's config on the command line, and a checkpoint of random weights for it."""
    from mmvmamba.engine.cli import add_cfg_options, load_config

    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    given = ["--cfg-options", *task.options]
    config = project / "configs" / task.config
    cfg = load_config(str(config), parser.parse_args(given).cfg_options)
    init_default_scope(task.name)
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))
    for name, parameter in model.named_parameters():
        # Boxes and scores that differ from each other.
        if any(part in name for part in ("rpn_cls", "rpn_reg", "fc_cls", "fc_reg")):
            parameter.data += 0.05 * torch.randn_like(parameter)
    path = folder / "model.pth"
    classes = [f"class {i}" for i in range(1000)]
    meta = {"dataset_meta": {"classes": classes}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return [str(config), str(path), *given], path


@pytest.mark.parametrize("name", list(tiny.TASKS))
def test_whole_models_equal_openmmlabs(name, project, sample_data, tmp_path):
    """The command line, whose check runs OpenMMLab's own test step, with its processing."""
    task = tiny.TASKS[name]
    (config, checkpoint, *options), _ = saved(task, project, tmp_path)
    pictures = sorted((sample_data / task.data).rglob("*.[jJ][pP]*[gG]"))[:2]
    assert pictures
    out = tmp_path / "model.onnx"
    done = tiny.run_python(
        *(project / "tools/deployment/export.py", config, checkpoint, out),
        *("--check", *pictures, *options),
        cwd=tmp_path,
        # Room for the table.
        COLUMNS="200",
    )
    assert "onnxruntime differs by" in done.stdout
    record = json.loads((tmp_path / "model.onnx.json").read_text())
    assert record["format"] == FORMAT
    assert record["task"] == name
    assert record["classes"][:2] == ["class 0", "class 1"]
    assert record["channels"] == "RGB"
    assert record["size"] is None
    outputs = {
        "mmpretrain": ["probabilities"],
        "mmseg": ["labels"],
        "mmdet": ["boxes", "scores", "labels", "masks"],
    }
    assert record["outputs"] == outputs[name]


def a_record(**changes) -> Record:
    known = {
        "task": "mmpretrain",
        "config": "config.py",
        "classes": ["a", "b"],
        "outputs": ["probabilities"],
        "channels": "RGB",
        "transforms": [],
        "size": None,
        "batched": True,
        "least": 8,
        "opset": 18,
        "versions": {},
    }
    return Record(**known | changes)


class Doubling(torch.nn.Module):
    def forward(self, x):
        return x * 2


@pytest.fixture(scope="module")
def doubling(tmp_path_factory) -> Path:
    """A file of ONNX that takes any images."""
    path = tmp_path_factory.mktemp("doubling") / "model.onnx"
    export.write(export.trace(Doubling(), torch.rand(2, 3, 9, 11), (0, 2, 3)), path, "onnx")
    return path


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"size": [16, 24]}, (1, 3, 16, 16), "made for images of 16x24 pixels, not 16x16"),
        ({"batched": False}, (2, 3, 16, 16), "takes one image a call, not 2"),
        ({}, (1, 3, 4, 16), "takes images from 8 pixels, not 4x16"),
    ],
)
def test_images_that_do_not_fit_are_refused(doubling, changes, shape, message):
    a_record(**changes).save(doubling)
    with pytest.raises(UsageError, match=message):
        runtimes.Deployed(doubling)(np.zeros(shape, np.float32))


def test_results_have_their_names(doubling):
    a_record().save(doubling)
    batch = images(2, 3, 16, 16).numpy()
    found = runtimes.Deployed(doubling)(batch)
    np.testing.assert_array_equal(found["probabilities"], batch * 2)


def test_files_that_cannot_be_used_say_what_to_do(doubling, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="does not exist"):
        runtimes.Deployed(path)
    path.write_bytes(doubling.read_bytes())
    with pytest.raises(UsageError, match=r"model\.onnx\.json is missing: copy it along"):
        runtimes.Deployed(path)
    a_record(format=FORMAT + 1).save(path)
    with pytest.raises(UsageError, match="update mmvmamba"):
        runtimes.Deployed(path)
    path_of(path).write_text("{}")
    with pytest.raises(UsageError, match="is no record of an export"):
        runtimes.Deployed(path)
    a_record().save(path)
    # What a runtime finds in a file of operators that it does not know yet.
    graph = onnx.load(path)
    graph.opset_import[0].version = 99
    onnx.save(graph, path)
    with pytest.raises(UsageError, match="update the runtime, or export the model anew"):
        runtimes.Deployed(path)
    with pytest.raises(UsageError, match="exported models end in"):
        runtimes.Deployed(tmp_path / "model.engine")


def test_what_cannot_be_exported_is_named(project):
    from mmengine.config import Config

    cfg = Config.fromfile(
        project / "configs/cascade_mask_rcnn"
        "/cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"
    )
    cfg.model.backbone.update(arch={"dims": 8, "depths": (1, 1, 1, 1)}, init_cfg=None)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64])
    for head in cfg.model.roi_head.bbox_head:
        head.fc_out_channels = 8
    init_default_scope("mmdet")
    with pytest.raises(UsageError, match="CascadeRoIHead cannot be exported; exported are Retina"):
        deployable("mmdet", MODELS.build(cfg.model))
    with pytest.raises(UsageError, match="models of 'mmpose' cannot be exported"):
        deployable("mmpose", Doubling())
    with pytest.raises(UsageError, match=r"--size 4 64: the model takes images from 8 pixels"):
        export.example_for(backbone(SMALL | {"downsample": "v2"}), (4, 64), True)


@pytest.mark.slow
def test_scan_paths_that_are_lists_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"^scan pattern 'hilbert' cannot be exported; cross2d,"):
        list(exported(backbone(SMALL, scan="hilbert"), tmp_path, ("onnx",)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHS, *SCANS])
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_every_arch_at_every_size(tmp_path, arch, kind):
    """What docs/deployment.md says was not run in full."""
    options = {"scan": arch} if arch in SCANS else {}
    model = backbone("tiny" if arch in SCANS else arch, **options)
    [run] = exported(model, tmp_path, (kind,))
    for size in SIZES:
        worst = max(errors(run, model, images(1, 3, *size)))
        warnings.warn(f"{arch}, {kind}, {size[0]}x{size[1]}: {worst:.1e}", stacklevel=1)
        assert worst <= TOLERANCE
