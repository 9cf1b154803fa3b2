"""Mixed precision on the CPU, in both types, through the command line's `--amp`."""

import math
import statistics

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from tiny import TASKS, command_line, scalars
from torch import nn

from mmvmamba.engine import cli, optim
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.checkpoint import read_checkpoint

NARROW = ("bfloat16", "float16")
# Of a loss at a tiny model's first step, to which three digits (bfloat16) of every activation went;
# it is an average of thousands of them.
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-3}


class Precisions(Hook):
    """Notes in which dtypes the backbone's linear layers compute, by their mode."""

    def __init__(self):
        self.seen = {True: set(), False: set()}

    def before_run(self, runner):
        for module in runner.model.backbone.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda module, _, out: self.seen[module.training].add(out.dtype)
                )


@pytest.fixture
def train(project, sample_data, tmp_path):
    """Trains a tiny model; returns its losses, the dtypes and the work directory."""

    def run(name, *options, folder="work", flags=()):
        work_dir = tmp_path / folder
        arguments = [*command_line(TASKS[name], project, sample_data, work_dir), *options, *flags]
        runner = cli.build_runner(cli.train_config(cli.parse_train_arguments(arguments)))
        precisions = Precisions()
        runner.register_hook(precisions)
        runner.train()
        losses = [line["loss"] for line in scalars(work_dir) if "loss" in line]
        return losses, precisions.seen, work_dir

    return run


@pytest.mark.parametrize("name", sorted(TASKS))
def test_training_in_both_types(name, train):
    """The first step's loss is that of float32 within the type's roundings."""
    (expected, *_), _, _ = train(name, folder="float32", flags=["--no-validate"])
    for dtype in NARROW:
        flags = ["--amp", "--no-validate"]
        losses, seen, work_dir = train(
            name, f"optim_wrapper.dtype={dtype}", folder=dtype, flags=flags
        )
        assert losses[0] == pytest.approx(expected, rel=TOLERANCE[dtype])
        assert all(math.isfinite(loss) for loss in losses)
        assert seen == {True: {getattr(torch, dtype)}, False: set()}
        state = read_checkpoint(work_dir / TASKS[name].last)
        assert "scale" in state["optimizer"]["loss_scaler"]
        # The weights themselves are float32.
        weights = state["state_dict"].values()
        assert {w.dtype for w in weights if w.is_floating_point()} == {torch.float32}


def test_the_loss_scale_outlives_an_interruption_and_validation_is_in_float32(train):
    options = [f"optim_wrapper.loss_scale.{k}" for k in ("init_scale=8.0", "growth_interval=1")]
    options.append("optim_wrapper.dtype=float16")
    _, seen, work_dir = train("mmpretrain", *options, flags=["--amp"])
    assert seen == {True: {torch.float16}, False: {torch.float32}}
    scaler = read_checkpoint(work_dir / "epoch_1.pth")["optimizer"]["loss_scaler"]
    assert scaler["scale"] == 8.0 * 2**2
    longer = TASKS["mmpretrain"].longer
    train("mmpretrain", *options, *longer, flags=["--amp", "--resume", "--no-validate"])
    scaler = read_checkpoint(work_dir / "epoch_2.pth")["optimizer"]["loss_scaler"]
    assert scaler["scale"] == 8.0 * 2**4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_sixty_steps_learn_as_in_float32(name, train):
    length = (
        ["train_cfg.max_iters=60"]
        if name == "mmseg"
        else ["train_cfg.max_epochs=30", "default_hooks.checkpoint.interval=30"]
    )
    ends = {}
    for dtype in ("float32", *NARROW):
        flags = ["--no-validate", *(["--amp"] if dtype in NARROW else [])]
        options = [*length, *([f"optim_wrapper.dtype={dtype}"] if dtype in NARROW else [])]
        losses, *_ = train(name, *options, folder=dtype, flags=flags)
        assert len(losses) == 60
        ends[dtype] = statistics.fmean(losses[-10:])
        assert ends[dtype] < 0.95 * losses[0]
    for dtype in NARROW:
        # Two trainings that began with other roundings differ by as much as their batches do.
        assert ends[dtype] == pytest.approx(ends["float32"], rel=0.15), ends


def wrapper(**settings):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    settings = {"optimizer": {"type": "SGD", "lr": 0.1}, **settings}
    return model, build_optim_wrapper(model, {"type": "mmvmamba.AmpOptimWrapper", **settings})


def test_the_cpu_computes_in_bfloat16_by_default():
    model, amp = wrapper()
    with amp.optim_context(model):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    assert model(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("scale", [512.0, "dynamic", {"init_scale": 2.0**10}], ids=str)
def test_gradients_are_not_scaled_in_an_update(scale):
    model, amp = wrapper(loss_scale=scale, dtype="float16", clip_grad={"max_norm": 1e9})
    before = model.weight.detach().clone()
    with amp.optim_context(model):
        # Scaled by 2^16, which float16 does not reach, a gradient of one would overflow.
        loss = model(torch.ones(1, 2)).float().sum() / 16
    amp.update_params(loss)
    # Powers of two scale without rounding.
    torch.testing.assert_close(model.weight.detach(), before - 0.1 / 16)


def test_an_overflow_leaves_the_weights_and_lowers_the_scale():
    model, amp = wrapper(loss_scale={"init_scale": 2.0**10}, dtype="float16")
    before = model.weight.detach().clone()
    amp.update_params(model(torch.ones(1, 2)).sum() * 1e38)
    assert torch.equal(model.weight, before)
    assert amp.loss_scaler.get_scale() == 2.0**9
    _, other = wrapper(dtype="float16")
    other.load_state_dict(amp.state_dict())
    assert other.loss_scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_scale": 512}, "loss_scale=512 must be 'dynamic', a float or a dict"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float16, bfloat16"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        wrapper(**settings)


def test_an_accelerator_is_left_to_mmengine(monkeypatch):
    monkeypatch.setattr(optim, "get_device", lambda: "cuda")
    with pytest.raises(AssertionError, match="only available"):
        wrapper()


def test_other_wrappers_are_refused(project, sample_data, tmp_path):
    arguments = command_line(TASKS["mmpretrain"], project, sample_data, tmp_path)
    arguments += ["optim_wrapper.type=ApexOptimWrapper", "--amp"]
    with pytest.raises(UsageError, match="--amp works with OptimWrapper.*ApexOptimWrapper"):
        cli.train_config(cli.parse_train_arguments(arguments))
