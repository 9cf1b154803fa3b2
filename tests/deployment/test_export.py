"""Exported backbones and whole models: small, standard, and equal to the originals."""

import contextlib
import io
import json
import runpy
import shutil
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

for folder in ("integration", "deployment"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

import small  # noqa: E402
import tiny  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from mmvmamba.analysis.pictures import load_model  # noqa: E402
from mmvmamba.deployment import check, export, runtimes  # noqa: E402
from mmvmamba.deployment.models import deployable  # noqa: E402
from mmvmamba.deployment.record import FORMAT, Record, path_of  # noqa: E402
from mmvmamba.engine.errors import UsageError  # noqa: E402
from mmvmamba.engine.tasks import scope_of  # noqa: E402
from mmvmamba.models import VMamba  # noqa: E402
from mmvmamba.models.checkpoint import read_checkpoint  # noqa: E402
from mmvmamba.registry import MODELS  # noqa: E402
from mmvmamba_kernels.backends.native import build  # noqa: E402

# Of maps against eager float32, relative to the largest number: what issue and docs promise.
TOLERANCE = 1e-5
SMALL = {"dims": 8, "depths": (1, 1)}
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
MAMBA2 = {
    **SMALL,
    "depths": (1,),
    "mixer": "mamba2",
    "d_state": 8,
    "dt_rank": 2,
    "act": "gelu",
    "init": "rand",
}
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
    ("arch", "options", "kinds"),
    [
        pytest.param(VANILLA, {}, ("onnx",), id="vanilla"),
        pytest.param(VANILLA, {}, ("openvino",), id="vanilla, openvino", marks=SLOW),
        pytest.param(MAMBA2, {}, ("onnx", "openvino"), id="mamba2", marks=SLOW),
        pytest.param(SMALL, {"scan": "cascade2d"}, ("onnx", "openvino"), id="cascade", marks=SLOW),
        pytest.param(
            SMALL | {"downsample": "v2"},
            {"scan": "bidi", "norm": "bn", "d_state": 2},
            ("onnx", "openvino"),
            id="bidi",
            marks=SLOW,
        ),
    ],
)
def test_backbones_equal_eager_ones_at_any_size(tmp_path, arch, options, kinds):
    model = backbone(arch, **options)
    for run in exported(model, tmp_path, kinds):
        check_at_any_size(run, model)


@pytest.fixture(scope="module")
def traced() -> tuple[VMamba, torch.export.ExportedProgram]:
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


@pytest.mark.slow
def test_graph_of_vmamba_t_is_small(tmp_path):
    list(exported(backbone("tiny"), tmp_path, ("onnx",)))
    check_graph(tmp_path / "model.onnx", blocks=14)


def test_scans_are_operators_of_the_cpp_kernels(tmp_path, traced):
    """One for each block, in a library that a process without PyTorch can register."""
    library = build.build_onnxruntime()
    assert b"libtorch" not in library.read_bytes()
    model, program = traced
    path = tmp_path / "model.onnx"
    export.write(program, path, "onnx", custom_op=True)
    nodes = [node for node in onnx.load(path).graph.node if node.domain]
    assert [(node.domain, node.op_type) for node in nodes] == [("mmvmamba", "SelectiveScan2d")] * 2
    check_at_any_size(runtimes.open_file(path, threads=2, custom_op=True), model)
    with pytest.raises(UsageError, match=r"cannot open .*SelectiveScan2d"):
        runtimes.open_file(path)


@pytest.mark.parametrize(
    ("pattern", "states", "size"),
    [("bidi", 3, (1, 9)), ("rows", 1, (7, 5)), ("columns", 2, (5, 7))],
)
def test_custom_operator_equals_the_kernels(pattern, states, size):
    import onnxruntime

    from mmvmamba_kernels import selective_scan_2d
    from mmvmamba_kernels.backends.native.cpp_scan import path_codes
    from mmvmamba_kernels.patterns import PATTERNS

    # Neither channels nor the rank fill a vector.
    batch, D, R, K = 2, 21, 3, len(PATTERNS[pattern])
    torch.manual_seed(0)
    feeds = {
        "x": torch.randn(batch, *size, D),
        "proj": torch.randn(batch, *size, K, R + 2 * states),
        "weight": torch.randn(K, D, R),
        "bias": torch.linspace(-7, 10, K * D).view(K, D),
        "A": -torch.rand(K, D, states) - 0.1,
        "D": torch.randn(K, D),
    }
    number = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "SelectiveScan2d",
        list(feeds),
        ["y"],
        domain="mmvmamba",
        paths=path_codes(PATTERNS[pattern]),
    )
    values = [
        onnx.helper.make_tensor_value_info(name, number, t.shape) for name, t in feeds.items()
    ]
    graph = onnx.helper.make_graph(
        [node], "scan", values, [onnx.helper.make_tensor_value_info("y", number, None)]
    )
    domains = [onnx.helper.make_opsetid(*one) for one in (("", export.OPSET), ("mmvmamba", 1))]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(build.build_onnxruntime()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    [found] = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    expected = selective_scan_2d(*feeds.values(), pattern=pattern, backend="reference")
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    feeds["D"] = feeds["D"].repeat(1, 2)
    values[-1].CopyFrom(onnx.helper.make_tensor_value_info("D", number, feeds["D"].shape))
    model.graph.input[-1].CopyFrom(values[-1])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    with pytest.raises(Exception, match="SelectiveScan2d: inputs do not fit each other"):
        session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


def test_pt2_file_runs(tmp_path, traced):
    model, program = traced
    path = tmp_path / "model.pt2"
    export.write(program, path, "pt2")
    check_at_any_size(runtimes.open_file(path), model)


@pytest.mark.slow
def test_pt2_file_runs_with_the_kernels_alone(tmp_path, traced):
    model, program = traced
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


# The others are slow: an exporter's time goes into the sizes that it does not know.
DEFAULT = {("mask-rcnn", "onnx", (128, 160), 2), ("upernet", "openvino", (128, 160), 2)}
WHOLE = [
    pytest.param(*one, id=" ".join(map(str, one)), marks=() if one in DEFAULT else SLOW)
    for name in small.CONFIGS
    for one in (
        (name, "onnx", None, 2),
        (name, "onnx", None, 4),
        (name, "openvino", None, 2),
        (name, "pt2", None, 2),
        (name, "onnx", (128, 160), 2),
        (name, "openvino", (128, 160), 2),
    )
]


@pytest.mark.parametrize(("name", "kind", "size", "stages"), WHOLE)
def test_whole_models_equal_openmmlabs(name, kind, size, stages, project, tmp_path):
    """OpenMMLab's own test step, with its processing, at two sizes or the one that is given."""
    cfg, checkpoint = small.make(name, project, tmp_path, stages)
    pictures = small.pictures(tmp_path)
    if size is not None:
        pictures = pictures[:1]
        resize = {"type": "Resize", "scale": size[::-1], "keep_ratio": False}
        cfg.test_dataloader.dataset.pipeline[1:-1] = [resize]
    out = tmp_path / f"model{export.FORMATS[kind]}"
    export.export_model(cfg, str(checkpoint), out, kind, size)
    for one in check.compare(cfg, str(checkpoint), runtimes.Deployed(out, threads=1), pictures):
        assert one.error <= 1e-4, one


def test_no_map_of_the_example_is_taken_for_fixed(project, tmp_path):
    """Sides of 1, and sides that equal each other, would hold for all images."""
    cfg, _ = small.make("retinanet", project, tmp_path, stages=4)
    module = deployable("mmdet", MODELS.build(cfg.model))
    example, dynamic = export.example_for(module, None, batched=False)
    assert dynamic == (2, 3)
    sides = [x.shape[2:] for x in module.model.extract_feat(module.normalised(example))]
    assert len(sides) == 6
    assert all(1 < height < width for height, width in sides)


@pytest.fixture(scope="module")
def classifier(project, tmp_path_factory) -> tuple[Path, list[str], list[Path]]:
    """What the command line exported and checked, its arguments, and pictures."""
    folder = tmp_path_factory.mktemp("classifier")
    cfg, checkpoint = small.make("classifier", project, folder)
    cfg.dump(folder / "config.py")
    arguments = [str(folder / "config.py"), str(checkpoint), folder / "model.onnx"]
    command = ["export.py", *map(str, arguments), "--check", *map(str, small.pictures(folder))]
    tool = runpy.run_path(str(project / "tools/deployment/export.py"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", command)
        # Room for the table.
        patch.setenv("COLUMNS", "200")
        tool["main"]()
    assert "onnxruntime differs by" in out.getvalue()
    return arguments[-1], arguments, small.pictures(folder)


def test_graph_is_standard_and_small(classifier):
    path, (config, checkpoint, _), _ = classifier
    check_graph(path, blocks=2)
    model = load_model(Config.fromfile(config), read_checkpoint(checkpoint), checkpoint)
    module, run = deployable("mmpretrain", model), runtimes.open_file(path, threads=1)
    # One image and several, wide and high, odd.
    for shape in ((1, 3, 48, 64), (3, 3, 67, 30)):
        batch = images(*shape) * 60 + 120
        [found], expected = run(batch.numpy()), module(batch).numpy()
        assert np.abs(found - expected).max() <= TOLERANCE * expected.max()


def test_record_says_what_the_file_takes_and_gives(classifier):
    record = json.loads(path_of(classifier[0]).read_text())
    assert record["format"] == FORMAT
    assert record["task"] == "mmpretrain"
    assert record["classes"][:2] == ["class 0", "class 1"]
    assert record["channels"] == "RGB"
    assert record["size"] is None
    assert record["outputs"] == ["probabilities"]
    assert record["custom_op"] is False
    assert [step["type"] for step in record["transforms"]] == [
        "LoadImageFromFile",
        "ResizeEdge",
        "CenterCrop",
    ]


def test_products_of_bytes_are_smaller_and_near(classifier, tmp_path):
    from mmvmamba.deployment.quantize import quantize

    out = tmp_path / "model.onnx"
    for source, target in ((classifier[0], out), (path_of(classifier[0]), path_of(out))):
        shutil.copyfile(source, target)
    cfg = Config.fromfile(classifier[1][0])
    quantize(cfg, out, classifier[2])
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    for one in check.compare(cfg, classifier[1][1], runtimes.Deployed(out), classifier[2]):
        # Of random weights, which keep less than trained ones of what 256 steps lose.
        assert 0 < one.error < 0.3


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("dino/dino-4scale_vmamba-tiny-s1l8_8xb2-12e_coco.py", "DINO cannot be exported; exported"),
        (
            "mask2former/mask2former_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py",
            "Mask2FormerHead cannot be exported; exported are heads of one logit",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(project, config, message):
    cfg = Config.fromfile(project / "configs" / config)
    cfg.model.backbone.update(arch={"dims": 8, "depths": (1, 1, 1, 1)}, init_cfg=None)
    channels = [8, 16, 32, 64]
    if "neck" in cfg.model:
        cfg.model.neck.in_channels = channels[-len(cfg.model.neck.in_channels) :]
    else:
        cfg.model.decode_head.in_channels = channels
    init_default_scope(scope_of(cfg))
    with pytest.raises(UsageError, match=message):
        deployable(scope_of(cfg), MODELS.build(cfg.model))


def test_what_does_not_fit_the_model_is_refused():
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
