"""Checkpoints that were made to do harm do none, by whatever way they come in."""

import builtins
import io
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import sys
import tarfile
import uuid
import warnings
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from mmvmamba.engine import cli
from mmvmamba.models import MM_VSSM, VMamba
from mmvmamba.models.checkpoint import CheckpointError, find_state_dict, read_checkpoint

CONFIGS = {
    "mmdet": ("configs/sample/mask-rcnn_vmamba-sample_coco.py", "coco"),
    "mmseg": ("configs/sample/upernet_vmamba-sample_ade20k.py", "ADEChallengeData2016"),
    "mmpretrain": ("configs/sample/vmamba-sample_imagenet.py", "imagenet"),
}
ARCH = {"dims": 8, "depths": (1, 1)}
# Upstream's own readers raise torch's errors.
REFUSED = (CheckpointError, pickle.UnpicklingError, RuntimeError)


class Payload:
    """Calls a function when it is unpickled without care."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark):
    return {
        "open": Payload(open, str(mark), "w"),
        "shell": Payload(os.system, f"touch {mark}"),
        "eval": Payload(builtins.eval, f"open({str(mark)!r}, 'w')"),
        "module": Payload(runpy.run_path, str(mark.with_name("script.py"))),
    }


@pytest.fixture
def mark(tmp_path):
    """The file that a payload makes; there must be none when the test is over."""
    path = tmp_path / "mark"
    (tmp_path / "script.py").write_text(f"open({str(path)!r}, 'w').close()")
    yield path
    assert not path.exists()


def content(payload):
    return {"state_dict": {"w": torch.ones(2)}, "meta": payload}


def as_zip(path, payload):
    torch.save(content(payload), path)


def as_legacy(path, payload):
    torch.save(content(payload), path, _use_new_zipfile_serialization=False)


def as_zip_of_legacy(path, payload):
    buffer = io.BytesIO()
    torch.save(content(payload), buffer, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.pth", buffer.getvalue())


def as_tar(path, payload):
    """The first of torch's formats, an archive of three pickles."""
    with tarfile.open(path, "w") as archive:
        for name, value in {"sys_info": {}, "storages": 0, "tensors": 0, "pickle": payload}.items():
            data = pickle.dumps(value, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def as_torchscript(path, payload):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, pickle.dumps(payload) if name.endswith(".pkl") else data)


def as_pickle(protocol):
    def write(path, payload):
        path.write_bytes(pickle.dumps(content(payload), protocol=protocol))

    return write


FORMATS = {
    "zip": as_zip,
    "legacy": as_legacy,
    "zip-of-legacy": as_zip_of_legacy,
    "tar": as_tar,
    "torchscript": as_torchscript,
    **{f"pickle-{protocol}": as_pickle(protocol) for protocol in (0, 2, 4, 5)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_no_format_runs_anything(kind, tmp_path, mark):
    path = tmp_path / "evil.pth"
    for payload in payloads(mark).values():
        FORMATS[kind](path, payload)
        with pytest.raises(CheckpointError, match=r"evil\.pth"):
            read_checkpoint(path)
        with pytest.raises(REFUSED):
            _load_checkpoint(str(path), map_location="cpu")
    assert not mark.exists()


def test_the_payloads_are_live(tmp_path):
    """Where nobody looks they do what they say."""
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    for payload in payloads(tmp_path / "mark").values():
        pickle.loads(pickle.dumps(payload))
        (tmp_path / "mark").unlink()


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module, name):
    return f"c{module}\n{name}\n".encode()


ATTRIBUTE = named("builtins", "getattr")
BUFFER = named("mmengine.logging.history_buffer", "HistoryBuffer")
DTYPE = named("numpy", "dtype")
# Pickles that use what mmengine's checkpoints need for something else.
ABUSES = {
    "attribute of a function": ATTRIBUTE
    + (ATTRIBUTE + BUFFER + text("mean") + b"\x86R")
    + (text("__globals__") + b"\x86R"),
    "attribute of a module": ATTRIBUTE + named("os", "system") + text("__call__") + b"\x86R",
    "class of the buffer": ATTRIBUTE + BUFFER + text("__class__") + b"\x86R",
    "a statistic of one's own": ATTRIBUTE + BUFFER + text("register_statistics") + b"\x86R",
    "a statistic that is called": ATTRIBUTE + BUFFER + text("mean") + b"\x86R)R",
    "a name that is an array": ATTRIBUTE + BUFFER + named("numpy", "ndarray") + b"\x86R",
    "the stand-in under its own name": named("mmvmamba.compat", "_history_buffer_statistic"),
    "array of objects": named("numpy", "ndarray")
    + b"K\x02\x85"
    + DTYPE
    + text("O")
    + b"\x85R\x86R",
    "structured type": DTYPE + text("i4,O") + b"\x85R",
    "other byte order": DTYPE + text(">f8") + b"\x85R",
    "type from a class": DTYPE + BUFFER + b"\x85R",
    "no end of memory": named("builtins", "bytearray") + b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85R",
    "a file of numpy's": named("numpy", "load") + text("x.npy") + b"\x85R",
}


@pytest.mark.parametrize("abuse", ABUSES)
def test_what_mmengines_checkpoints_need_cannot_be_abused(abuse, tmp_path, mark):
    path = tmp_path / "evil.pth"
    save_raw(path, ABUSES[abuse])
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_checkpoint(path)


def save_raw(path, instructions):
    """A checkpoint in torch's format with a pickle made by hand: {"x": ...}."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + text("x") + instructions + b"s.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")


def test_a_file_gives_numpys_types_no_fields_of_its_own(tmp_path):
    """numpy would take the bytes for addresses of objects, and look there."""
    fields = {"a": (np.dtype("O"), 0)}

    class Forged(np.ndarray):
        def __reduce__(self):
            function, arguments, _ = np.zeros(1).__reduce__()
            return function, arguments, (1, (2,), ForgedType(), False, b"A" * 16)

    class ForgedType:
        def __reduce__(self):
            return np.dtype, ("f8", False, True), (3, "<", None, ("a",), fields, -1, -1, 0)

    # It works where it is let: the array believes to hold objects.
    assert pickle.loads(pickle.dumps(Forged(1))).dtype.fields
    torch.save({"x": Forged(1)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"numpy type 'O8'"):
        read_checkpoint(tmp_path / "evil.pth")
    fields.clear()
    torch.save({"x": Forged(1)}, tmp_path / "evil.pth")
    found = read_checkpoint(tmp_path / "evil.pth")["x"]
    assert found.dtype.fields is None
    assert found.dtype == np.float64


def test_what_mmengine_stores_is_still_read(tmp_path):
    stored = {
        "hub": HistoryBuffer([0.5, 0.25], [1, 1]),
        "arrays": [np.arange(3, dtype=code) for code in "bBhHiIlLqQefd"],
        "scalars": [np.float32(2.5), np.int64(-3), np.bool_(True)],
    }
    torch.save(stored, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found["hub"].mean() == 0.375
    assert found["scalars"] == stored["scalars"]
    for ours, theirs in zip(found["arrays"], stored["arrays"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_a_file_that_unfolds_is_refused_before_it_does(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    assert (tmp_path / "bomb.pth").stat().st_size < 10**5
    with pytest.raises(CheckpointError, match=r"bomb\.pth is damaged .* is compressed"):
        read_checkpoint(tmp_path / "bomb.pth")


def damaged(rng, wholes):
    """A whole file's bytes with one to three faults, or with faults in its pickle alone."""
    kind, data = rng.choice(wholes)
    if kind == "zip" and rng.random() < 0.4:
        # Checksums that fit, as those of a file made to do harm.
        source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as target:
            for name in source.namelist():
                part = bytearray(source.read(name))
                for _ in range(rng.randint(1, 3) if name.endswith("data.pkl") else 0):
                    part[rng.randrange(len(part))] = rng.randrange(256)
                target.writestr(name, bytes(part))
        return buffer.getvalue()
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        fault = rng.choice(("bit", "byte", "cut", "insert", "end"))
        if fault == "bit":
            data[place] ^= 1 << rng.randrange(8)
        elif fault == "byte":
            data[place] = rng.randrange(256)
        elif fault == "cut":
            del data[place : place + rng.randint(1, 40)]
        elif fault == "insert":
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize(
    "count", [1500, pytest.param(100_000, marks=pytest.mark.slow, id="many")], ids=str
)
def test_damaged_files_are_read_or_refused_by_name(count, tmp_path):
    state = {f"layer.{i}": torch.arange(6.0).reshape(2, 3) + i for i in range(3)}
    hub = {"loss": HistoryBuffer([0.5], [1]), "lr": np.float64(2)}
    whole = {"state_dict": state, "meta": {"epoch": 1}, "message_hub": hub, "optimizer": {}}
    wholes = []
    for kind, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(whole, buffer, _use_new_zipfile_serialization=new)
        wholes.append((kind, buffer.getvalue()))
    rng, path, refused = random.Random(0), tmp_path / "damaged.pth", 0
    for _ in range(count):
        path.write_bytes(damaged(rng, wholes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = find_state_dict(read_checkpoint(path), path)[1]
            except CheckpointError as error:
                found, message = {}, str(error)
                refused += 1
        assert "damaged.pth" in message if not found else all(map(torch.is_tensor, found.values()))
    # Some faults hit padding, or a number's value in a file without checksums.
    assert refused > 0.5 * count


# The ways in.


@pytest.fixture
def evil(tmp_path, mark):
    """A checkpoint that would be whole, but for its payload."""
    state = {f"backbone.{key}": value for key, value in VMamba(ARCH).state_dict().items()}
    payload = payloads(mark)["open"]
    whole = {"state_dict": state, "meta": {}, "message_hub": {}, "optimizer": payload}
    torch.save(whole, tmp_path / "evil.pth")
    return tmp_path / "evil.pth"


@pytest.fixture
def arguments(project, sample_data, tmp_path):
    """A task's command line, with the work directory `tmp_path / "work"`."""

    def make(name="mmpretrain", *options):
        config, data = CONFIGS[name]
        run_name = uuid.uuid4().hex
        return [
            str(project / config),
            *("--data-root", str(sample_data / data), "--work-dir", str(tmp_path / "work")),
            *("--cfg-options", f"experiment_name={run_name}", f"visualizer.name={run_name}"),
            *("train_dataloader.num_workers=0", "val_dataloader.num_workers=0"),
            *("test_dataloader.num_workers=0", "train_cfg.max_epochs=1", *options),
        ]

    return make


def train(arguments, *more):
    cli.train(cli.parse_train_arguments([*arguments, *more]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_test_runs_nothing(name, arguments, evil):
    config, *rest = arguments(name)
    rest = [option for option in rest if not option.startswith("train_cfg")]
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not loaded: it contains more than weights"
    ):
        cli.test(cli.parse_test_arguments([config, str(evil), *rest]))


@pytest.mark.parametrize("place", ["load_from", "backbone", "model"])
def test_weights_to_begin_with_run_nothing(place, arguments, evil):
    cfg = cli.train_config(cli.parse_train_arguments(arguments()))
    if place == "load_from":
        cfg.load_from = str(evil)
    else:
        part = cfg.model.backbone if place == "backbone" else cfg.model
        part.init_cfg = {"type": "Pretrained", "checkpoint": str(evil)}
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not loaded: it contains more than weights"
    ):
        cli.build_runner(cfg).train()


@pytest.mark.parametrize("how", ["file", "auto"])
def test_a_resumed_training_runs_nothing(how, arguments, evil, tmp_path):
    if how == "auto":
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "last_checkpoint").write_text(str(evil))
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not loaded: it contains more than weights"
    ):
        train(arguments(), "--resume", *([str(evil)] if how == "file" else []))


def test_a_config_in_a_checkpoint_is_not_run(arguments, tmp_path, mark):
    """mmengine would, to compare the number of GPUs."""
    train(arguments())
    saved = tmp_path / "work" / "epoch_1.pth"
    whole = read_checkpoint(saved)
    whole["meta"]["config"] = f"open({str(mark)!r}, 'w').close()"
    torch.save(whole, tmp_path / "evil.pth")
    shutil.rmtree(tmp_path / "work")
    train(arguments("mmpretrain", "train_cfg.max_epochs=2"), "--resume", str(tmp_path / "evil.pth"))
    assert (tmp_path / "work" / "epoch_2.pth").is_file()


def test_pretrained_arguments_run_nothing(evil):
    kind = {"type": "Pretrained", "checkpoint": str(evil)}
    with pytest.raises(CheckpointError, match="evil"):
        VMamba(ARCH, init_cfg=kind).init_weights()
    with pytest.raises(CheckpointError, match="evil"):
        MM_VSSM(dims=8, depths=[1, 1], out_indices=(0, 1), pretrained=str(evil))


def upstreams_ways(name, config, checkpoint):
    """What a user of upstream's own functions calls with a config and a checkpoint."""
    if name == "mmdet":
        from mmdet.apis import DetInferencer, init_detector

        yield lambda: init_detector(config, checkpoint, device="cpu")
        yield lambda: DetInferencer(config, checkpoint, device="cpu")
    elif name == "mmseg":
        from mmseg.apis import MMSegInferencer, init_model

        yield lambda: init_model(config, checkpoint, device="cpu")
        yield lambda: MMSegInferencer(config, checkpoint, device="cpu")
    else:
        from mmpretrain import ImageClassificationInferencer, get_model

        yield lambda: get_model(config, pretrained=checkpoint, device="cpu")
        yield lambda: ImageClassificationInferencer(config, pretrained=checkpoint, device="cpu")


@pytest.fixture
def fetched(tmp_path, evil, monkeypatch):
    """An address whose file is the one that does harm."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda _, path, *args, **kw: shutil.copy(evil, path)
    )
    return "https://models.invalid/evil.pth"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_upstreams_functions_run_nothing(name, project, evil, fetched):
    """With files and, which PyTorch reads with less care by itself, with addresses."""
    config = str(project / CONFIGS[name][0])
    for checkpoint in (str(evil), fetched):
        for way in upstreams_ways(name, config, checkpoint):
            with pytest.raises(pickle.UnpicklingError):
                way()


def test_fetched_weights_of_any_module_run_nothing(fetched, monkeypatch):
    from mmengine.model import BaseModule
    from mmengine.runner import checkpoint

    class Neck(BaseModule):
        pass

    with pytest.raises(pickle.UnpicklingError):
        Neck(init_cfg={"type": "Pretrained", "checkpoint": fetched}).init_weights()
    with pytest.raises(CheckpointError, match="evil"):
        read_checkpoint(fetched)
    monkeypatch.setattr(checkpoint, "get_torchvision_models", lambda: {"resnet50": fetched})
    monkeypatch.setattr(checkpoint, "get_external_models", lambda: {"resnet50": fetched})
    monkeypatch.setattr(checkpoint, "get_mmcls_models", lambda: {"resnet50": fetched})
    for scheme in ("torchvision", "open-mmlab", "mmcls"):
        with pytest.raises(pickle.UnpicklingError):
            load_checkpoint(torch.nn.Linear(1, 1), f"{scheme}://resnet50")


TOOLS = {
    "model_converters/convert_checkpoint.py": "EVIL OUT --to ours --config CONFIG",
    "analysis_tools/visualize.py": "CONFIG EVIL --device cpu --out-dir OUT",
    "analysis_tools/activation_maps.py": "CONFIG IMAGE --checkpoint EVIL --device cpu",
    "analysis_tools/erf.py": "CONFIG=EVIL --images IMAGES --device cpu",
    "analysis_tools/scale_up.py": "CONFIG EVIL --device cpu",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_run_nothing(tool, project, sample_data, evil, tmp_path, monkeypatch, capsys):
    images = sample_data / "imagenet" / "val"
    names = {
        "CONFIG": str(project / CONFIGS["mmpretrain"][0]),
        "EVIL": str(evil),
        "OUT": str(tmp_path / "out"),
        "IMAGES": str(images),
        "IMAGE": str(next(images.rglob("*.JPEG"))),
    }
    line = TOOLS[tool].split()
    for name, value in names.items():
        line = [value if part == name else part.replace(f"={name}", f"={value}") for part in line]
    line = [part.replace("CONFIG=", f"{names['CONFIG']}=") for part in line]
    if "scale_up" in tool or "visualize" in tool:
        line += ["--data-root", str(sample_data / "imagenet")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *line])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(project / "tools" / tool), run_name="__main__")
    assert (
        "evil.pth was not loaded: it contains more than weights"
        in str(end.value.code) + capsys.readouterr().out
    )


def test_the_variable_that_switches_torchs_check_off_does_not_switch_ours_off(
    evil, fetched, mark, monkeypatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for source in (evil, fetched):
        with pytest.raises(CheckpointError, match="contains more than weights"):
            read_checkpoint(source)


def test_logs_and_tables_are_no_pickles(tmp_path, mark, monkeypatch, project):
    """What `analyze_logs.py` reads are JSON lines: a pickle in their place is refused."""
    folder = tmp_path / "work" / "20260101_000000" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_bytes(pickle.dumps(payloads(mark)["open"]))
    monkeypatch.setattr(sys, "argv", ["analyze_logs.py", str(tmp_path / "work")])
    with pytest.raises((SystemExit, json.JSONDecodeError, UnicodeDecodeError)):
        runpy.run_path(str(project / "tools/analysis_tools/analyze_logs.py"), run_name="__main__")


def test_configs_are_code_by_design(tmp_path):
    """So that nobody takes them for data: what SECURITY.md says of them is true."""
    path = tmp_path / "config.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nx = 1\n")
    assert Config.fromfile(path).x == 1
    assert (tmp_path / "ran").exists()
