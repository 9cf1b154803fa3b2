"""Exported backbones: small, standard, and equal to the originals; and what opens files."""

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

from mmvmamba.deployment import export, runtimes  # noqa: E402
from mmvmamba.deployment.models import deployable  # noqa: E402
from mmvmamba.deployment.record import FORMAT, Record, path_of  # noqa: E402
from mmvmamba.engine.errors import UsageError  # noqa: E402
from mmvmamba.engine.tasks import scope_of  # noqa: E402
from mmvmamba.models import VMamba  # noqa: E402
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
    """What runs a backbone in other runtimes, at any size."""
    return files(export.trace(model, *export.example_for(model, None, True)), folder, kinds)


def files(program: torch.export.ExportedProgram, folder: Path, kinds: tuple[str, ...]):
    """What runs a program in other runtimes."""
    program = export.to_onnx(program, None)
    for kind in kinds:
        path = folder / f"model{export.FORMATS[kind]}"
        program.save(path) if kind == "onnx" else export.write_openvino(program, path)
        yield runtimes.open_file(path, threads=torch.get_num_threads())


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs(model: torch.nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return model(batch)


def errors(run, expected: list[torch.Tensor], batch: torch.Tensor) -> list[float]:
    found = [torch.from_numpy(array) for array in run(batch.numpy())]
    assert [f.shape for f in found] == [e.shape for e in expected]
    return [
        ((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected, strict=True)
    ]


def check_at_any_size(run, model: VMamba) -> None:
    # One image and several, wide and high, odd.
    for shape in ((1, 3, 48, 64), (3, 3, 67, 30)):
        batch = images(*shape)
        assert max(errors(run, outputs(model, batch), batch)) <= TOLERANCE


@pytest.fixture(scope="module")
def traced() -> tuple[VMamba, torch.export.ExportedProgram]:
    model = backbone(SMALL)
    return model, export.trace(model, *export.example_for(model, None, True))


def test_cross_scans_run_at_any_size(tmp_path, traced):
    model, program = traced
    for run in files(program, tmp_path, ("onnx", "openvino")):
        check_at_any_size(run, model)
    check_graph(tmp_path / "model.onnx", blocks=2)


def test_pt2_file_runs_at_any_size(tmp_path, traced):
    model, program = traced
    path = tmp_path / "model.pt2"
    export.write(program, path, "pt2")
    check_at_any_size(runtimes.open_file(path), model)


def test_vanilla_backbones_run_at_one_size(tmp_path):
    """More states than one, gates, and odd maps; at any size they take minutes: see below."""
    model, batch = backbone(VANILLA), images(1, 3, 36, 52)
    [run] = files(export.trace(model, batch), tmp_path, ("onnx",))
    assert max(errors(run, outputs(model, batch), batch)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        pytest.param(VANILLA, {}, id="vanilla"),
        pytest.param(MAMBA2, {}, id="mamba2"),
        pytest.param(SMALL, {"scan": "cascade2d"}, id="cascade"),
        pytest.param(
            SMALL | {"downsample": "v2"}, {"scan": "bidi", "norm": "bn", "d_state": 2}, id="bidi"
        ),
    ],
)
def test_backbones_run_at_any_size(tmp_path, arch, options):
    model = backbone(arch, **options)
    for run in exported(model, tmp_path, ("onnx", "openvino")):
        check_at_any_size(run, model)


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


def test_no_map_of_the_example_is_taken_for_fixed(project, tmp_path):
    """Sides of 1, and sides that equal each other, would hold for all images."""
    cfg, _ = small.make("retinanet", project, tmp_path, stages=4)
    module = deployable("mmdet", MODELS.build(cfg.model))
    example, dynamic = export.example_for(module, None, batched=False)
    assert dynamic == (2, 3)
    sides = [x.shape[2:] for x in module.model.extract_feat(module.normalised(example))]
    assert len(sides) == 6
    assert all(1 < height < width for height, width in sides)


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
    message = r"model\.onnx \(.* till opset \d+\): .* update onnxruntime, or export the model anew"
    with pytest.raises(UsageError, match=message):
        runtimes.Deployed(path)
    with pytest.raises(UsageError, match="exported models end in"):
        runtimes.Deployed(tmp_path / "model.engine")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.onnx", b"", "No graph was found in the protobuf"),
        ("model.onnx", b"junk", "Protobuf parsing failed"),
        ("model.xml", b"<net><layers/></net>", ".*"),
        ("model.pt2", b"junk", "it is no zip archive"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    message = rf"^\w+ \S+ cannot open .*{name} \({reason}\): copy it again with the files beside it"
    with pytest.raises(UsageError, match=message):
        runtimes.open_file(tmp_path / name)


def test_a_folder_that_cannot_be_made_is_told_before_the_export(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"model\.pt2 cannot be written: .*file"):
        export.check_format(tmp_path / "file" / "model.pt2", "pt2")


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
def test_every_arch_at_every_size(tmp_path, arch):
    """One file for all sizes; the errors are those of docs/deployment.md."""
    options = {"scan": arch} if arch in SCANS else {}
    model = backbone("tiny" if arch in SCANS else arch, **options)
    kinds = ("onnx", "openvino")
    runs = dict(zip(kinds, exported(model, tmp_path, kinds), strict=True))
    for size in SIZES:
        batch = images(1, 3, *size)
        expected = outputs(model, batch)
        for kind, run in runs.items():
            worst = max(errors(run, expected, batch))
            warnings.warn(f"{arch}, {kind}, {size[0]}x{size[1]}: {worst:.1e}", stacklevel=1)
            assert worst <= TOLERANCE
