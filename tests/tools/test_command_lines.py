"""What train.py and test.py make of their command lines, and how they refuse what cannot work."""

import os
import re
import subprocess
import sys

import pytest
import torch
import warm
from stand_ins import write_module

from mmvmamba.engine import cli, launch
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.launch import main
from mmvmamba.engine.processes import check_gpus, prepare_launch, process_place
from mmvmamba.models.checkpoint import CheckpointError

CONFIG = "configs/sample/vmamba-sample_imagenet.py"
DETECTOR = "configs/sample/mask-rcnn_vmamba-sample_coco.py"


@pytest.fixture
def train_config(sample_data, tmp_path):
    def make(*options, config=CONFIG, data="imagenet"):
        root = ["--data-root", str(sample_data / data), "--work-dir", str(tmp_path)]
        return cli.train_config(cli.parse_train_arguments([config, *root, *options]))

    return make


@pytest.fixture
def test_config(sample_data, tmp_path):
    (tmp_path / "weights.pth").touch()

    def make(*options, config=CONFIG, data="imagenet"):
        root = ["--data-root", str(sample_data / data), "--work-dir", str(tmp_path)]
        arguments = [config, str(tmp_path / "weights.pth"), *root, *options]
        return cli.test_config(cli.parse_test_arguments(arguments))

    return make


def test_an_unknown_config_gets_the_nearest_names(tmp_path):
    with pytest.raises(UsageError, match=r"no config .*\n.*vmamba-sample_imagenet\.py"):
        cli.load_config("configs/sample/vmamba-sample_imgnet.py")
    (tmp_path / "my_detector.py").touch()
    with pytest.raises(UsageError, match=r"no config .*\n.*/my_detector\.py"):
        cli.load_config(f"{tmp_path}/my_detecter.py")


def test_an_unknown_name_in_the_package_is_refused():
    with pytest.raises(UsageError, match="no config mmvmamba::sample/nothing.py"):
        cli.load_config("mmvmamba::sample/nothing.py")


def test_a_config_must_say_its_task(tmp_path):
    (tmp_path / "bare.py").write_text("model = dict()")
    with pytest.raises(UsageError, match="no default_scope"):
        cli.train_config(cli.parse_train_arguments([str(tmp_path / "bare.py")]))


def test_the_data_root_can_be_a_config_option_too(train_config, sample_data):
    moved = f"data_root={sample_data / 'imagenet'}"
    cfg = train_config("--data-root", "/nowhere", "--cfg-options", moved)
    assert cfg.train_dataloader.dataset.data_root.rstrip("/") == str(sample_data / "imagenet")


@pytest.mark.parametrize("found", [None, "/elsewhere/imagenet"])
def test_where_data_were_found_is_said(monkeypatch, found):
    monkeypatch.setattr(cli, "find_data", lambda *_: found)
    notices = cli.load_config_and_data(CONFIG).get(cli.NOTICES) or []
    said = [notice for notice in notices if notice.startswith("data found")]
    assert said == ([f"data found at {found}."] if found else [])


def test_the_work_directory_defaults_to_the_configs_name(sample_data):
    root = ["--data-root", str(sample_data / "imagenet")]
    cfg = cli.train_config(cli.parse_train_arguments([CONFIG, *root]))
    assert cfg.work_dir == "work_dirs/vmamba-sample_imagenet"


def test_learning_rate_scaling(train_config):
    assert train_config("--auto-scale-lr").auto_scale_lr.enable
    with pytest.raises(UsageError, match="base_batch_size"):
        train_config("--auto-scale-lr", "--cfg-options", "auto_scale_lr={}")


def test_mixed_precision(train_config):
    wrapper = train_config("--amp").optim_wrapper
    assert (wrapper.type, wrapper.loss_scale) == ("mmvmamba.AmpOptimWrapper", "dynamic")
    with pytest.raises(UsageError, match="dtype=fp16: expected float16 or bfloat16"):
        train_config("--amp", "--cfg-options", "optim_wrapper.dtype=fp16")


def test_no_workers_are_kept_where_there_are_none(train_config):
    cfg = train_config("--cfg-options", "train_dataloader.num_workers=0")
    assert not cfg.train_dataloader.persistent_workers
    assert cfg.train_dataloader.collate_fn.type == "default_collate"


def test_missing_checkpoints_are_refused_before_anything_is_built(train_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        train_config("--resume", "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        train_config("--cfg-options", "load_from=nowhere.pth")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        cli.test_config(cli.parse_test_arguments([CONFIG, "nowhere.pth"]))


def test_a_missing_data_set_is_refused_before_anything_is_built():
    with pytest.raises(UsageError, match="/nowhere does not exist"):
        cli.train_config(cli.parse_train_arguments([CONFIG, "--data-root", "/nowhere"]))


def test_predictions_need_a_file_name_of_their_kind(test_config):
    assert test_config("--out", "x.pkl").test_evaluator[-1].type == "DumpResults"
    detector = test_config("--out", "x.pkl", config=DETECTOR, data="coco")
    assert detector.test_evaluator[-1].type == "DumpDetResults"
    with pytest.raises(UsageError, match=r"ends in \.pkl"):
        test_config("--out", "x.json")


def test_pictures_need_their_hook(test_config):
    cfg = test_config("--show-dir", "pictures", config=DETECTOR, data="coco")
    assert cfg.default_hooks.visualization.draw
    with pytest.raises(UsageError, match="visualization hook"):
        test_config("--show-dir", "x", "--cfg-options", "default_hooks.visualization=None")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(UsageError, match="3 processes .* 2 GPUs"):
        check_gpus(3)
    with pytest.raises(SystemExit, match="3 processes .* 2 GPUs"):
        main(["--nproc_per_node=3", "train.py"])
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="3 processes .* 2 GPUs"):
        prepare_launch("pytorch")


def test_the_cores_are_shared_by_the_processes(monkeypatch):
    found = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setattr(launch.agent, "install", lambda: None)
    monkeypatch.setattr(launch.torchrun, "run", lambda _: found.update(os.environ))
    for processes, threads in ((1, "7"), (3, "2"), (9, "1")):
        monkeypatch.setattr(os, "environ", {})
        main([f"--nproc_per_node={processes}", "train.py"])
        assert found["OMP_NUM_THREADS"] == threads
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "5"})
    main(["--nproc_per_node=3", "train.py"])
    assert found["OMP_NUM_THREADS"] == "5"


def test_any_number_of_processes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(64)


def test_a_launcher_that_did_not_launch(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for launcher in ("pytorch", "slurm", "mpi"):
        with pytest.raises(UsageError, match=f"--launcher {launcher}: .* not set"):
            prepare_launch(launcher)
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    assert process_place("slurm", slurm) == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
def test_mistakes_end_with_one_message(project, tmp_path, tool):
    arguments = ["configs/nothing.py", *(["weights.pth"] if tool == "test.py" else [])]
    done = warm.run(
        [sys.executable, project / "tools" / tool, *arguments],
        tasks=False,
        cold=tool == "test.py",
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: no config configs/nothing.py") == 1
    assert "Traceback" not in done.stderr


def test_a_wrong_mmcv_ends_with_one_message(project, tmp_path):
    write_module(tmp_path, "mmcv", "2.2.0")
    done = subprocess.run(
        [sys.executable, project / "tools/train.py", CONFIG],
        env={"PYTHONPATH": f"{tmp_path}:{project}:{project / 'kernels'}", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    # Beside OneDL's packages it is the wrong distribution too.
    assert re.search(r"mmcv 2\.2\.0 is installed(, | beside .*: )mmvmamba needs", done.stderr)
    assert "Traceback" not in done.stderr


def test_without_mmvmamba_the_tools_say_how_to_install_it(project, tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", project / "tools/train.py"],
        env={"PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: mmvmamba is not installed for")
    assert "quickstart.sh" in done.stderr
