"""What logs hold and what schedulers will do, against real trainings."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import TASKS, run_python, scalars

from mmvmamba.analysis import curves
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError


def test_curves_are_what_was_logged(trained):
    lines = scalars(trained.work_dir)
    logged = [line for line in lines if "loss" in line]
    read = curves.read_log(trained.work_dir)
    for key in ("loss", "lr", "time"):
        iterations, values = curves.curve(read, key)
        assert iterations.tolist() == [line["iter"] for line in logged]
        assert values.tolist() == [line[key] for line in logged]
    iterations, values = curves.curve(read, trained.task.metric)
    assert values.tolist() == [
        line[trained.task.metric] for line in lines if trained.task.metric in line
    ]
    # The validation came after the last iteration, whether its line counts epochs or iterations.
    assert iterations.tolist() == [logged[-1]["iter"]]
    assert trained.task.metric in curves.metrics(read)
    assert "loss" not in curves.metrics(read)


def test_the_learning_rate_is_the_one_of_the_training(trained):
    logged = [line for line in scalars(trained.work_dir) if "loss" in line]
    scheduled = curves.scheduled(load_config(str(trained.config)))
    assert len(scheduled["lr"]) == logged[-1]["iter"] == len(logged)
    np.testing.assert_allclose(scheduled["lr"], [line["base_lr"] for line in logged], rtol=1e-12)
    assert len(set(scheduled["lr"])) > 1
    optimizer = load_config(str(trained.config)).optim_wrapper.optimizer
    assert set(scheduled["weight_decay"]) == {optimizer.weight_decay}
    assert set(scheduled["momentum"]) == {optimizer.betas[0]}


def test_processes_and_batches_make_the_epochs(train_once):
    cfg = load_config(str(train_once("mmdet").config))
    cfg.train_cfg.max_epochs = 3
    assert len(curves.scheduled(cfg, dataset_size=100)["lr"]) == 3 * 50
    # 100 images for 3 processes are 34 each, and 17 batches of 2.
    assert len(curves.scheduled(cfg, processes=3, dataset_size=100)["lr"]) == 3 * 17
    cfg.train_dataloader.drop_last = True
    assert len(curves.scheduled(cfg, processes=4, dataset_size=100)["lr"]) == 3 * 12


def test_epochs_at_which_the_rate_steps_down():
    cfg = load_config("configs/mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
    rate = curves.scheduled(cfg, processes=8, dataset_size=1600)["lr"]
    base, length = cfg.optim_wrapper.optimizer.lr, 100
    assert len(rate) == 12 * length
    # The warm-up's 1000 iterations are most of this training, and become a tenth of it.
    np.testing.assert_allclose(rate[119 : 8 * length], base)
    np.testing.assert_allclose(rate[8 * length : 11 * length], base / 10)
    np.testing.assert_allclose(rate[11 * length :], base / 100)
    cfg.auto_scale_lr = {"enable": True, "base_batch_size": 32}
    np.testing.assert_allclose(
        curves.scheduled(cfg, processes=8, dataset_size=1600)["lr"], rate / 2, rtol=1e-6
    )


def test_a_training_without_a_length_is_refused(train_once):
    cfg = load_config(str(train_once("mmseg").config))
    del cfg.train_cfg["max_iters"]
    with pytest.raises(UsageError, match="neither max_epochs nor max_iters"):
        curves.scheduled(cfg)


def write_log(folder, name, *lines):
    file = folder / name / "vis_data" / curves.LOG_NAME
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_line(iteration, loss):
    return {"loss": loss, "time": 1.0, "iter": iteration, "step": iteration}


def test_a_resumed_training_is_one_curve(tmp_path):
    first = [train_line(i, 10.0 - i) for i in range(1, 7)]
    validation = {"mIoU": 12.5, "time": 0.1, "step": 4}
    write_log(tmp_path, "20260101_000000", *first[:4], validation, *first[4:])
    write_log(tmp_path, "20260101_010000", *(train_line(i, 20.0 - i) for i in range(5, 8)))
    lines = curves.read_log(tmp_path)
    iterations, values = curves.curve(lines, "loss")
    assert iterations.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert values.tolist() == [9.0, 8.0, 7.0, 6.0, 15.0, 14.0, 13.0]
    iterations, values = curves.curve(lines, "mIoU")
    assert (iterations.tolist(), values.tolist()) == ([4], [12.5])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no scalars\.json"):
        curves.read_log(tmp_path)
    (tmp_path / curves.LOG_NAME).write_text("loss: 3\n")
    with pytest.raises(UsageError, match=r"scalars\.json, line 1: .*mmengine"):
        curves.read_log(tmp_path)
    with pytest.raises(UsageError, match="'lost' was not logged. Logged were: loss, time"):
        curves.curve([train_line(1, 2.0)], "lost")


def test_the_picture_shows_the_values(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    iterations, values = np.array([1, 2, 5]), np.array([3.0, 1.0, 2.0])
    curves.plot({"a": (iterations, values)}, "loss", tmp_path / "new" / "a.png", "title")
    [axes] = figures[0].axes
    [line] = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), iterations)
    np.testing.assert_array_equal(line.get_ydata(), values)
    assert (axes.get_ylabel(), axes.get_title()) == ("loss", "title")


def test_the_command_lines(train_once, project, tmp_path):
    trained = train_once(sorted(TASKS)[0])
    tools = project / "tools/analysis_tools"
    options = ("--keys", "loss", trained.task.metric, "--plot", "log.png")
    done = run_python(tools / "analyze_logs.py", trained.work_dir, *options, cwd=tmp_path)
    logged = [line for line in scalars(trained.work_dir) if "loss" in line]
    [row] = [line for line in done.stdout.splitlines() if "│ loss " in line]
    assert f"{logged[-1]['loss']:.4g}" in row
    assert (tmp_path / "log.png").stat().st_size > 0
    options = ("--out", "rate.png")
    done = run_python(tools / "vis_scheduler.py", trained.config, *options, cwd=tmp_path)
    assert f"{len(logged)} iterations; lr from {logged[0]['base_lr']:.4g}" in done.stdout
    assert (tmp_path / "rate.png").stat().st_size > 0
