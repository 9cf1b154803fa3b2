"""Strict loading: what fits is loaded and reported, what does not is refused by name."""

import collections
import functools
import http.server
import os
import pickle
import subprocess
import sys
import threading
import types

import golden
import pytest
import torch
import warm
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit

from mmvmamba.models import MM_VSSM, VMamba
from mmvmamba.models.checkpoint import (
    CheckpointError,
    classifier_from_official,
    convert,
    current_names,
    find_state_dict,
    load_backbone,
    name_to_official_classifier,
    read_checkpoint,
)

ARCH = {"dims": 8, "depths": (1, 1)}


@pytest.fixture
def state():
    torch.manual_seed(1)
    return VMamba(ARCH).state_dict()


def backbone(**kwargs):
    torch.manual_seed(2)
    return VMamba(ARCH, **kwargs)


def save(path, content):
    torch.save(content, path)
    return path


def without_outnorm(state):
    return {k: v for k, v in state.items() if not k.startswith("outnorm")}


def assert_loaded(model, state):
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "mmengine", "ddp"])
def test_layouts(tmp_path, state, wrap):
    content = {
        "bare": state,
        "state_dict": {"state_dict": state},
        "model": {"model": state, "epoch": 3},
        "mmengine": {
            "meta": {},
            "state_dict": {f"backbone.{k}": v for k, v in state.items()}
            | {"neck.w": torch.ones(1)},
        },
        "ddp": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[wrap]
    model = backbone()
    report = load_backbone(model, save(tmp_path / "a.pth", content))
    assert_loaded(model, state)
    assert len(report.loaded) == len(state)
    assert report.kept == ()
    assert report.ignored == (("neck.w",) if wrap == "mmengine" else ())


def test_moving_average_is_preferred(tmp_path, state):
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    model = backbone()
    report = load_backbone(model, save(tmp_path / "a.pth", {"model": other, "model_ema": state}))
    assert report.entry == "model_ema"
    assert_loaded(model, state)


def test_classification_file_may_lack_outnorm_and_only_that(tmp_path, state):
    content = without_outnorm(state) | {"classifier.head.weight": torch.ones(10, 16)}
    model = backbone()
    report = load_backbone(model, save(tmp_path / "a.pth", {"model": content}))
    assert set(report.kept) == {f"outnorm{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}
    assert report.ignored == ("classifier.head.weight",)
    assert "classifier.head.weight" in str(report)
    assert "keep their initial value: outnorm0.bias" in str(report)
    assert_loaded(model, content)


def test_outnorms_that_are_not_returned_are_ignored(tmp_path, state):
    model = backbone(out_indices=(1,))
    report = load_backbone(model, save(tmp_path / "a.pth", state))
    assert set(report.ignored) == {"outnorm0.weight", "outnorm0.bias"}


def test_convolution_weights_of_linear_layers_are_taken(tmp_path, state):
    as_convolutions = {
        k: v[:, :, None, None]
        if (v.ndim == 2 and "proj.weight" in k) or (".fc" in k and v.ndim == 2)
        else v
        for k, v in state.items()
    }
    assert any(v.shape[2:] == (1, 1) for v in as_convolutions.values())
    model = backbone()
    load_backbone(model, save(tmp_path / "a.pth", as_convolutions))
    assert_loaded(model, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.blocks.0.op.A_logs"), r"1 keys are missing: layers.0.*A_logs"),
        (lambda s: s.pop("outnorm1.weight"), r"1 keys are missing: outnorm1.weight"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 keys are unknown: extra"),
        (
            lambda s: s.update({"patch_embed.0.weight": torch.ones(3, 3, 3, 3)}),
            r"1 shapes differ: patch_embed.0.weight \(3, 3, 3, 3\), expected \(4, 3, 3, 3\)",
        ),
    ],
)
def test_any_other_difference_is_refused_and_changes_nothing(tmp_path, state, change, message):
    change(state)
    model = backbone()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_backbone(model, save(tmp_path / "odd.pth", state))
    assert "odd.pth" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_file(tmp_path, state, keep):
    path = save(tmp_path / "cut.pth", state)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(keep if keep >= 1 or keep == 0 else int(size * keep))
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_checkpoint(path)


def test_flipped_bit_in_a_tensor(tmp_path, state):
    path = save(tmp_path / "flip.pth", state)
    content = bytearray(path.read_bytes())
    needle = state["layers.1.blocks.0.mlp.fc1.weight"].numpy().tobytes()
    content[content.find(needle) + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flip\.pth is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", r"is empty\. Fetch or write it again"),
        (b"<html>404</html>", r"is a web page, not a checkpoint"),
        (b"\n<!DOCTYPE html>", r"is a web page, not a checkpoint"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            r"is a Git LFS pointer, .* git lfs pull",
        ),
        (b"PK\x03\x04" + bytes(200), r"is incomplete: it ends after 204 bytes"),
    ],
)
def test_files_that_are_something_else_are_refused_with_the_cause(tmp_path, content, cause):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth {cause}"):
        read_checkpoint(path)


def test_a_fetched_file_that_is_damaged_is_to_be_deleted(server, state):
    folder, address = server
    save(folder / "cut.pth", state)
    whole = (folder / "cut.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"Delete it and fetch {address}/cut\.pth again"):
        read_checkpoint(f"{address}/cut.pth")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="contains a list, expected a dict"):
        read_checkpoint(save(tmp_path / "list.pth", [torch.ones(1)]))
    with pytest.raises(CheckpointError, match=r"no state dict.*It has: epoch"):
        find_state_dict({"epoch": 3}, "x.pth")


class Payload:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_nothing_in_a_file_is_run(tmp_path, state):
    mark = tmp_path / "mark"
    path = save(tmp_path / "evil.pth", {"state_dict": state, "config": Payload(mark)})
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not loaded: it contains more than weights"
    ):
        read_checkpoint(path)
    assert not mark.exists()
    # The payload does what it says where nobody looks.
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_official_configuration_object_is_read_as_plain_data(tmp_path, state, monkeypatch):
    class CfgNode(dict):
        """Stands for yacs' class, which the official training script saves beside the weights."""

        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = CfgNode({"MODEL": CfgNode({"DROP_PATH_RATE": 0.2})})
    path = save(tmp_path / "a.pth", {"model": state, "config": config})
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    found = read_checkpoint(path)
    assert type(found["config"]) is collections.OrderedDict
    assert found["config"]["MODEL"]["DROP_PATH_RATE"] == 0.2
    load_backbone(backbone(), path)


def test_init_cfg_is_strict(tmp_path, state):
    path = save(tmp_path / "a.pth", without_outnorm(state))
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    model.init_weights()
    assert_loaded(model, without_outnorm(state))
    missing = str(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        backbone(init_cfg={"type": "Pretrained", "checkpoint": missing}).init_weights()


def test_init_cfg_prefix(tmp_path, state):
    content = {f"student.{k}": v for k, v in state.items()} | {"teacher.w": torch.ones(1)}
    path = str(save(tmp_path / "a.pth", content))
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": path, "prefix": "student"})
    model.init_weights()
    assert_loaded(model, state)
    with pytest.raises(CheckpointError, match="no key that starts with 'nobody.'"):
        load_backbone(backbone(), path, prefix="nobody")


def test_init_cfg_chooses_an_entry_of_the_file(tmp_path, state):
    averaged = {key: value + 1 for key, value in state.items()}
    path = str(save(tmp_path / "a.pth", {"model": state, "model_ema": averaged}))
    for entry, expected in ((None, averaged), ("model_ema", averaged), ("model", state)):
        model = backbone(init_cfg={"type": "Pretrained", "checkpoint": path, "entry": entry})
        model.init_weights()
        assert_loaded(model, expected)
    with pytest.raises(CheckpointError, match="expected one under ema. It has: model, model_ema"):
        backbone().load_pretrained(path, entry="ema")
    official = MM_VSSM(**golden.load("cross_s1").kwargs)
    assert official.load_pretrained(None) is None


def test_pretrained_is_short_for_init_cfg(tmp_path, state):
    path = str(save(tmp_path / "a.pth", {"model": state}))
    model = backbone(pretrained=path)
    assert model.init_cfg == {"type": "Pretrained", "checkpoint": path}
    model.init_weights()
    assert_loaded(model, state)
    assert backbone(pretrained=None).init_cfg is None
    with pytest.raises(ValueError, match="pretrained=.* and init_cfg=.* are both given"):
        backbone(pretrained=path, init_cfg={"type": "Pretrained", "checkpoint": path})


def test_init_cfg_of_another_type_and_none():
    model = backbone(init_cfg={"type": "Constant", "layer": "Conv2d", "val": 0.5, "bias": 0.25})
    model.init_weights()
    assert (model.patch_embed[0].weight == 0.5).all()
    untouched = backbone()
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    untouched.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())


def test_official_pretrained_argument(tmp_path, state):
    data = golden.load("cross_s1")
    path = save(tmp_path / "a.pth", {"model": data.weights})
    model = MM_VSSM(**data.kwargs, pretrained=str(path)).eval()
    assert_loaded(model, data.backbone_weights)
    key_model = MM_VSSM(**data.kwargs)
    averaged = {"model": data.weights, "model_ema": MM_VSSM(**data.kwargs).state_dict()}
    key_model.load_pretrained(str(save(tmp_path / "b.pth", averaged)), key="model")
    assert_loaded(key_model, data.backbone_weights)
    MM_VSSM(**data.kwargs, pretrained="")
    MM_VSSM(**data.kwargs, pretrained=None)
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        MM_VSSM(**data.kwargs, pretrained="nowhere.pth")


def test_classifier_keys_go_both_ways():
    official = {k: v for k, v in golden.load("cross_s1").weights.items() if "outnorm" not in k}
    ours = classifier_from_official(official)
    assert {k.split(".")[0] for k in ours} == {"backbone", "head"}
    assert "head.norm.weight" in ours
    assert "head.head.bias" in ours
    back = {name_to_official_classifier(key): value for key, value in ours.items()}
    assert back.keys() == official.keys()
    assert all(back[k] is official[k] for k in official)
    with pytest.raises(CheckpointError, match="'neck.w' belongs neither"):
        name_to_official_classifier("neck.w")


def before_the_release(official):
    """An official classification state dict under the names of the first code."""
    renamed = {}
    for key, value in official.items():
        old = key.removeprefix("classifier.")
        old = old.replace("patch_embed.0.", "patch_embed.proj.")
        old = old.replace("patch_embed.2.", "patch_embed.norm.")
        if ".blocks." in old:
            layer, _, rest = old.partition(".blocks.")
            block, part, rest = rest.split(".", 2)
            part = {"norm": "ln_1", "op": "self_attention"}[part]
            old = f"{layer}.blocks.{block}.{part}.{rest}"
        renamed[old] = value
    return renamed


def test_files_from_before_the_release_get_the_names_of_today(tmp_path):
    data = golden.load("vanilla")
    official = without_outnorm(data.weights)
    old = before_the_release(official)
    assert {"patch_embed.proj.weight", "norm.weight", "head.bias"} < old.keys()
    assert "layers.0.blocks.0.self_attention.A_logs" in old
    assert "layers.0.blocks.0.self_attention.out_norm.weight" in old
    assert "layers.0.downsample.norm.weight" in old
    entry, found = find_state_dict({"model": old}, "old.pth")
    assert entry == "model"
    assert found.keys() == official.keys()
    assert all(found[key] is official[key] for key in official)

    model = MM_VSSM(**data.kwargs)
    report = load_backbone(model, save(tmp_path / "old.pth", {"model": old}))
    assert_loaded(model, without_outnorm(data.backbone_weights))
    assert all(key.startswith("outnorm") for key in report.kept)

    detector = {
        f"module.backbone.{k}": v for k, v in before_the_release(data.backbone_weights).items()
    } | {"module.bbox_head.norm.weight": torch.ones(1), "module.head.w": torch.ones(1)}
    model = MM_VSSM(**data.backbone_kwargs)
    report = load_backbone(model, save(tmp_path / "det.pth", {"state_dict": detector}))
    assert_loaded(model, data.backbone_weights)
    assert report.kept == ()
    assert {key for key in report.ignored if key.startswith("bbox")} == {"bbox_head.norm.weight"}


def test_names_of_today_stay():
    for case in golden.CASES:
        keys = golden.load(case).weights
        assert current_names(keys) == {key: key for key in keys}
    ours = ["backbone.patch_embed.norm.weight", "neck.norm.weight", "head.fc.weight"]
    assert current_names(ours) == {key: key for key in ours}


@pytest.mark.parametrize("case", golden.CASES)
def test_a_converted_classifier_has_the_official_logits_and_converts_back(case):
    registry = pytest.importorskip("mmpretrain.registry").MODELS
    data = golden.load(case)
    official = without_outnorm(data.weights)
    ours = convert({"model_ema": official, "model": {}}, "a.pth", "ours", classifier=True)
    assert ours.entry == "model_ema"
    norm = "bn" if data.kwargs.get("norm_layer") == "bn" else "ln"
    head = {
        "type": "mmvmamba.VMambaClsHead",
        "num_classes": len(official["classifier.head.bias"]),
        "in_channels": len(official["classifier.norm.weight"]),
        "norm": norm,
    }
    last = len(data.outs) - 1
    backbone = {"type": "mmvmamba.MM_VSSM", **data.kwargs, "out_indices": (last,)}
    model = registry.build(
        {"type": "mmpretrain.ImageClassifier", "backbone": backbone, "head": head}
    ).eval()
    missing, unknown = model.load_state_dict(ours.state, strict=False)
    assert not unknown
    assert all(key.startswith(f"backbone.outnorm{last}.") for key in missing)
    # The head reads the map before the official backbone's outnorm, as our configs do.
    model.backbone.outnorm = False
    with torch.no_grad():
        assert golden.relative_error(model(data.input, mode="tensor"), data.logits) < 1e-4
    back = convert({"state_dict": ours.state}, "b.pth", "official", classifier=True)
    assert list(back.state) == list(official)
    assert all(back.state[key] is official[key] for key in official)


def test_conversions_account_for_every_key(state):
    official = {f"module.{k}": v for k, v in state.items()} | {
        "module.classifier.head.bias": torch.ones(1)
    }
    result = convert({"model": official}, "a.pth", "ours", classifier=True)
    assert set(result.names) == set(official)
    assert set(result.left_out) == {k for k in official if "outnorm" in k}
    assert result.names["module.classifier.head.bias"] == "head.head.bias"
    assert result.names["module.patch_embed.0.bias"] == "backbone.patch_embed.0.bias"
    detector = {"backbone.a": torch.ones(1), "roi_head.b": torch.ones(1)}
    for to in ("ours", "official"):
        result = convert({"state_dict": detector}, "d.pth", to, classifier=False)
        assert result.state == detector


def test_conversions_of_the_wrong_thing_are_refused(state):
    with pytest.raises(CheckpointError, match="'patch_embed.0.weight' belongs neither"):
        convert({"model": state}, "a.pth", "official", classifier=True)
    with pytest.raises(CheckpointError, match=r"a\.pth has no state dict: expected one under ema"):
        convert({"model": state}, "a.pth", "ours", classifier=True, entry="ema")
    twice = {"w": torch.ones(1), "module.w": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"a\.pth has more than one value for w"):
        convert({"model": twice}, "a.pth", "ours", classifier=False)


def test_official_classification_weights_run_in_an_image_classifier():
    registry = pytest.importorskip("mmpretrain.registry").MODELS
    data = golden.load("cross_s1")
    head = {"type": "mmvmamba.VMambaClsHead", "num_classes": 10, "in_channels": 64}
    backbone = {
        "type": "mmvmamba.VMamba",
        "arch": {"dims": 8, "depths": (1, 1, 2, 1)},
        "out_indices": (3,),
        "outnorm": False,
    }
    model = registry.build(
        {"type": "mmpretrain.ImageClassifier", "backbone": backbone, "head": head}
    ).eval()
    model.load_state_dict(classifier_from_official(data.weights), strict=True)
    # float32 on both sides, summed in different orders.
    assert golden.relative_error(model(data.input, mode="tensor"), data.logits) < 1e-4


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server over `tmp_path / "web"`; downloads are kept in `tmp_path` too."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_address_is_fetched_once_and_loaded_strictly(server, state):
    folder, address = server
    file = save(folder / "a.pth", {"model": state})
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": f"{address}/a.pth"})
    model.init_weights()
    assert_loaded(model, state)
    file.unlink()
    load_backbone(backbone(), f"{address}/a.pth")


@pytest.mark.parametrize("other", ["2/a.pth", "1/a.pth?release=2"])
def test_files_of_one_name_are_told_apart_by_their_address(server, other):
    folder, address = server
    for value, name in enumerate(("1/a.pth", other)):
        file = folder / name.partition("?")[0]
        file.parent.mkdir(exist_ok=True)
        save(file, {"state_dict": {"w": torch.tensor(value)}})
        fetched = read_checkpoint(f"{address}/{name}")
        assert fetched["state_dict"]["w"] == value


def test_nothing_in_a_fetched_file_is_run(server, state, tmp_path):
    folder, address = server
    mark = tmp_path / "mark"
    save(folder / "evil.pth", {"state_dict": state, "config": Payload(mark)})
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not loaded: it contains more than weights"
    ):
        read_checkpoint(f"{address}/evil.pth")
    assert not mark.exists()


@pytest.mark.parametrize("address", ["https://weights.invalid/a.pth", "torchvision://resnet50"])
def test_address_that_cannot_be_fetched_is_named(address, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=f"checkpoint {address}.*give its path"):
        read_checkpoint(address)


def test_missing_page_is_named(server):
    _, address = server
    with pytest.raises(CheckpointError, match=r"nothing\.pth could not be downloaded.*404"):
        read_checkpoint(f"{address}/nothing.pth")


@pytest.mark.parametrize("content", [b"r", b"N", b"\x80\x02", b"PK\x03\x04"])
def test_short_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "short.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"short\.pth"):
        read_checkpoint(path)


def test_pretrained_settings_are_strict_under_any_name(tmp_path):
    path = str(save(tmp_path / "zzz.pth", {"zzz": torch.ones(1)}))
    for kind in ("Pretrained", "mmengine.Pretrained", PretrainedInit):
        model = backbone(init_cfg=[{"type": kind, "checkpoint": path}])
        with pytest.raises(CheckpointError, match="keys are unknown: zzz"):
            model.init_weights()


def test_official_pretrained_argument_outlasts_the_parents_initialisation(tmp_path):
    data = golden.load("cross_s1")
    path = save(tmp_path / "a.pth", {"model": data.weights})
    parent = BaseModule({"type": "TruncNormal", "layer": "Linear", "std": 0.02})
    parent.backbone = MM_VSSM(**data.kwargs, pretrained=str(path))
    parent.init_weights()
    assert_loaded(parent.backbone, data.backbone_weights)


def test_two_processes_fetch_once_and_both_load(server, state, tmp_path):
    """As under torchrun: one process of a machine fetches, the other waits for it."""
    folder, address = server
    torch.save({"model": state}, folder / "weights.pth")
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\n"
        "from mmvmamba.engine.processes import prepare_launch\n"
        "from mmvmamba.models.checkpoint import read_checkpoint\n"
        "prepare_launch('pytorch', None)\n"
        "sys.stdout.write(f\"keys {len(read_checkpoint(sys.argv[1])['model'])}\\n\")\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = warm.run(
        [sys.executable, *launch, str(script), f"{address}/weights.pth"],
        tasks=False,
        env={**os.environ, "TORCH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"keys {len(state)}") == 2
    assert list((tmp_path / "home").rglob("weights.pth"))


STEM = "patch_embed.0.weight"


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("how", ["repeat", "mean"])
def test_weights_of_photographs_start_a_model_of_other_images(tmp_path, state, channels, how):
    file = save(tmp_path / "a.pth", state)
    init_cfg = {"type": "Pretrained", "checkpoint": str(file), "in_channels": how}
    model = backbone(in_channels=channels, init_cfg=init_cfg)
    model.init_weights()
    assert_loaded(model, {key: value for key, value in state.items() if key != STEM})
    found, weight = state[STEM], model.state_dict()[STEM]
    if how == "mean" or channels == 1:
        # A gray image, alike in all channels, gives what it gave.
        torch.testing.assert_close(weight.sum(1), found.sum(1), rtol=1e-5, atol=1e-6)
        expected = found.mean(1, keepdim=True).expand(-1, channels, -1, -1) * (3 / channels)
    else:
        expected = torch.stack([found[:, i % 3] * (3 / channels) for i in range(channels)], 1)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels", [4, 13])
def test_channels_behind_the_colours_can_begin_at_zero(tmp_path, state, channels):
    model = backbone(in_channels=channels)
    load_backbone(model, save(tmp_path / "a.pth", state), in_channels="zeros")
    weight = model.state_dict()[STEM]
    assert torch.equal(weight[:, :3], state[STEM])
    assert not weight[:, 3:].any()


def test_other_channels_are_refused_with_the_setting(tmp_path, state):
    file = save(tmp_path / "a.pth", state)
    model = backbone(in_channels=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="3 channels, the model's have 4: in_channels in ini"):
        load_backbone(model, file)
    with pytest.raises(CheckpointError, match="in_channels='twice': choose from repeat, mean, zer"):
        load_backbone(model, file, in_channels="twice")
    with pytest.raises(CheckpointError, match="1 are fewer than the file's 3: choose 'mean'"):
        load_backbone(backbone(in_channels=1), file, in_channels="zeros")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_stem_of_as_many_channels_is_taken_as_it_is(tmp_path, state):
    model = backbone()
    load_backbone(model, save(tmp_path / "a.pth", state), in_channels="mean")
    assert_loaded(model, state)
