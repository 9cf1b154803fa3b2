"""One training and one evaluation of each task, and the options that change them."""

import dataclasses
import math
import pickle
import uuid

import pytest
import torch
from tiny import TASKS, command_line, run, scalars

from mmvmamba.engine import cli
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.checkpoint import CheckpointError, read_checkpoint


def evaluate(trained, *options):
    arguments = [trained.arguments[0], str(trained.checkpoint), *trained.arguments[1:]]
    return cli.test(cli.parse_test_arguments([*arguments, *own_name(), *options]))


def own_name():
    name = uuid.uuid4().hex
    return ["--cfg-options", f"experiment_name={name}", f"visualizer.name={name}"]


def test_a_training_step_and_an_evaluation(trained):
    lines = scalars(trained.work_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert any(trained.task.metric in line for line in lines)
    weights = read_checkpoint(trained.checkpoint)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_test_reports_and_dumps(trained, tmp_path):
    out = tmp_path / "new" / "predictions.pkl"
    metrics = evaluate(trained, "--out", str(out), "--work-dir", str(tmp_path / "work"))
    assert trained.task.metric in metrics
    with out.open("rb") as file:
        assert len(pickle.load(file)) >= 2


def test_pictures_are_where_they_were_asked_for(trained, tmp_path):
    evaluate(trained, "--show-dir", str(tmp_path / "pictures"), "--work-dir", str(tmp_path))
    pictures = [p for p in (tmp_path / "pictures").rglob("*") if p.suffix in (".png", ".jpg")]
    assert len(pictures) >= 2


@pytest.mark.parametrize("name", ["mmseg", "mmpretrain"])
def test_test_time_augmentation(name, train_once, tmp_path):
    first = train_once(name)
    metrics = evaluate(first, "--tta", "--work-dir", str(tmp_path))
    assert first.task.metric in metrics


def test_test_time_augmentation_of_masks_is_refused_and_of_boxes_runs(train_once, tmp_path):
    first = train_once("mmdet")
    with pytest.raises(UsageError, match="boxes, not masks") as error:
        evaluate(first, "--tta", "--work-dir", str(tmp_path))
    advice = str(error.value).partition("--cfg-options ")[2].replace('"', "").split()
    metrics = evaluate(first, "--tta", "--work-dir", str(tmp_path), "--cfg-options", *advice)
    assert "coco/bbox_mAP" in metrics
    assert "coco/segm_mAP" not in metrics


def test_segmentation_writes_its_maps_to_a_folder(train_once, tmp_path):
    evaluate(train_once("mmseg"), "--out", str(tmp_path / "maps"), "--work-dir", str(tmp_path))
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2


@pytest.mark.parametrize("name", sorted(TASKS))
def test_resume(name, train_once, tmp_path):
    """From a path, and from the newest checkpoint of a work directory that has moved since."""
    first = train_once(name)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in ("last_checkpoint", first.checkpoint.name):
        (moved / file).write_bytes((first.work_dir / file).read_bytes())
    (moved / "last_checkpoint").write_text(f"/gone/{first.checkpoint.name}")
    other = tmp_path / "other"
    for work_dir, resume in ((other, [str(first.checkpoint)]), (moved, [])):
        longer = [*own_name(), *first.task.longer, "--work-dir", str(work_dir)]
        arguments = [*first.arguments, *longer, "--resume", *resume]
        cli.train(cli.parse_train_arguments(arguments))
        steps = [line["step"] for line in scalars(work_dir) if "loss" in line]
        begun = read_checkpoint(first.checkpoint)["meta"]["iter"]
        assert min(steps) > begun
        last = (work_dir / "last_checkpoint").read_text()
        assert read_checkpoint(last)["meta"]["iter"] == 2 * begun
    if name == "mmpretrain":
        # The training is at its end.
        cli.train(cli.parse_train_arguments(arguments))
        log = max(moved.glob("*/*.log")).read_text()
        assert f"nothing is left to train: {last} has {2 * begun} of {2 * begun} iterations" in log


def test_resume_with_nothing_to_resume_starts_from_the_beginning(project, sample_data, tmp_path):
    arguments = command_line(TASKS["mmpretrain"], project, sample_data, tmp_path)
    options = cli.parse_train_arguments([*arguments, "--resume"])
    cfg = cli.train_config(options)
    assert not cfg.resume
    assert "from the beginning" in cfg[cli.NOTICES][0]


def test_another_models_checkpoint_is_refused_and_fine_tuning_says_what_may_differ(
    train_once, tmp_path
):
    first = train_once("mmpretrain")
    arguments = [*first.arguments, "--work-dir", str(tmp_path), *own_name()]
    arguments += ["model.head.num_classes=1001", f"load_from={first.checkpoint}"]
    # Of the weights alone: the data have 1000 classes.
    arguments += ["accepted_disagreements=['class_count']"]
    with pytest.raises(
        CheckpointError, match=r"head\.\S+ \(1000, 128\), the model's is \(1001, 128\)"
    ):
        cli.train(cli.parse_train_arguments(arguments))
    cli.train(cli.parse_train_arguments([*arguments, "load_ignore=['head.head']"]))
    assert (tmp_path / first.task.last).is_file()


def test_a_pretrained_file_of_the_whole_model_must_fit(train_once, tmp_path):
    first = train_once("mmpretrain")
    unfit = tmp_path / "unfit.pth"
    torch.save({"zzz": torch.ones(1)}, unfit)
    arguments = [*first.arguments, "--work-dir", str(tmp_path), *own_name()]
    cfg = cli.train_config(cli.parse_train_arguments(arguments))
    cfg.model.init_cfg = {"type": "mmengine.Pretrained", "checkpoint": str(unfit)}
    with pytest.raises(CheckpointError, match=r"unfit\.pth does not fit the model"):
        cli.build_runner(cfg).train()


def test_damaged_and_unfit_files_stop_a_run_before_its_first_step(train_once, tmp_path):
    first = train_once("mmpretrain")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(first.checkpoint.read_bytes()[:5000])
    weights = tmp_path / "weights.pth"
    torch.save(read_checkpoint(first.checkpoint)["state_dict"], weights)
    pretrained = "model.backbone.init_cfg.type=Pretrained"
    for options, message in (
        (["--resume", str(truncated)], "truncated.pth"),
        (["--resume", str(weights)], "holds weights, not the state of a training"),
        (["--cfg-options", f"load_from={truncated}"], "truncated.pth"),
        (
            ["--cfg-options", pretrained, "model.backbone.init_cfg.checkpoint=nowhere.pth"],
            "nowhere.pth does not exist",
        ),
    ):
        work_dir = tmp_path / "out"
        arguments = [*first.arguments, "--work-dir", str(work_dir), *own_name(), *options]
        with pytest.raises(CheckpointError, match=message):
            cli.train(cli.parse_train_arguments(arguments))
        assert not list(work_dir.glob("*.pth"))


def test_bare_weights_can_be_tested_and_trained_from(train_once, tmp_path):
    first = train_once("mmpretrain")
    weights = tmp_path / "weights.pth"
    torch.save(read_checkpoint(first.checkpoint)["state_dict"], weights)
    metrics = evaluate(dataclasses.replace(first, checkpoint=weights), "--work-dir", str(tmp_path))
    assert first.task.metric in metrics


def test_two_processes_on_the_cpu(project, sample_data, tmp_path):
    """Trains and tests through the shell scripts, from another directory, SyncBN included."""
    task = TASKS["mmseg"]
    sync_bn = ("model.decode_head.norm_cfg.type=SyncBN",)
    arguments = [*command_line(task, project, sample_data, tmp_path), *sync_bn]
    train = run(
        *("bash", project / "tools/dist_train.sh", arguments[0], "2", *arguments[1:]),
        cwd=tmp_path,
    )
    assert "SyncBN does not run on the CPU" in train.stdout
    checkpoint = tmp_path / task.last
    assert checkpoint.is_file()
    test = run(
        *("bash", project / "tools/dist_test.sh", arguments[0], checkpoint, "2"),
        *arguments[1:],
        cwd=tmp_path,
    )
    assert task.metric in test.stdout
