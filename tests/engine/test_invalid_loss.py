"""A loss that is not finite ends a training, and what is left of it shows where it began."""

import re
import uuid

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tiny import TASKS, command_line, run
from torch import nn

from mmvmamba.engine import cli, invalid_loss_hook, replay
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.invalid_loss_hook import InvalidLossError, StopOnInvalidLoss
from mmvmamba.engine.nonfinite import describe, random_states, set_random_states, trace_step
from mmvmamba.models.checkpoint import CheckpointError

NAN = float("nan")
LAYER = "backbone.layers.1.blocks.0.mlp.fc1"
# As in DDP's processes, which import this file; there rank 1 alone is given it.
SABOTAGE = f"""
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Sabotage(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1 and os.environ["RANK"] == "1":
            runner.model.module.get_submodule("{LAYER}").weight.data.fill_(3e38)
"""


class HugeWeights(Hook):
    """Makes one layer's result overflow in the second iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            runner.model.get_submodule(LAYER).weight.data.fill_(3e38)
            self.before = {k: v.clone() for k, v in runner.model.named_parameters()}


@pytest.fixture
def runner_of(project, sample_data, tmp_path):
    """Makes a tiny training's runner."""

    def make(name, *options):
        arguments = command_line(TASKS[name], project, sample_data, tmp_path)
        arguments += ["train_dataloader.sampler.shuffle=False", *options, "--no-validate"]
        return cli.build_runner(cli.train_config(cli.parse_train_arguments(arguments)))

    return make


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_first_module_is_named_and_the_file_shows_it_again(name, runner_of, tmp_path, capsys):
    runner = runner_of(name)
    sabotage = HugeWeights()
    runner.register_hook(sabotage)
    with pytest.raises(InvalidLossError, match="loss of iteration 2 is not finite") as error:
        runner.train()
    message = str(error.value)
    assert re.search(rf"first module with a non-finite result: {LAYER} \(Linear\): given", message)
    assert "clip_grad" in message
    # Nothing was updated.
    for key, parameter in runner.model.named_parameters():
        assert torch.equal(parameter, sabotage.before[key]), key

    file = tmp_path / "invalid_loss_iter_2.pt"
    assert str(file) in message
    content = replay.read_step(file)
    assert content["iteration"] == 2
    assert len(content["images"]) == 2
    assert all(image in message for image in content["images"])
    assert replay.replay(content).origins[0].module == f"{LAYER} (Linear)"
    replay.main([str(file)])
    assert f"first module with a non-finite result: {LAYER}" in capsys.readouterr().out


def without_scopes(settings):
    if isinstance(settings, dict):
        return {k: without_scopes(v) for k, v in settings.items() if k != "_scope_"}
    return list(map(without_scopes, settings)) if isinstance(settings, list | tuple) else settings


def test_classes_without_a_scope_are_those_of_the_default_one(runner_of, tmp_path):
    """As in a config that inherits nothing from an installed package."""
    runner = runner_of("mmpretrain")
    runner.register_hook(HugeWeights())
    with pytest.raises(InvalidLossError):
        runner.train()
    content = replay.read_step(tmp_path / "invalid_loss_iter_2.pt")
    content["config"] = without_scopes(content["config"])
    assert replay.replay(content).origins[0].module == f"{LAYER} (Linear)"


def test_one_of_two_processes_ends_both(project, sample_data, tmp_path):
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    task = TASKS["mmpretrain"]
    config = tmp_path / "config.py"
    config.write_text(
        f'_base_ = "{project / "configs" / task.config}"\n'
        'custom_imports = dict(imports=["sabotage"])\n'
        'custom_hooks = [dict(type="Sabotage")]\n'
    )
    _, *arguments = command_line(task, project, sample_data, tmp_path / "work")
    arguments += ["train_dataloader.batch_size=1"]
    done = run(
        *("bash", project / "tools/dist_train.sh", config, "2", *arguments),
        cwd=tmp_path,
        check=False,
        PYTHONPATH=f"{tmp_path}:{project}:{project / 'kernels'}",
    )
    assert done.returncode == 1, done.stdout[-3000:]
    assert "in process 1:" in done.stdout
    assert "in process 0:" not in done.stdout
    assert f"first module with a non-finite result: {LAYER}" in done.stdout
    assert "Traceback" not in done.stdout
    files = sorted(path.name for path in (tmp_path / "work").glob("invalid_loss*"))
    assert files == ["invalid_loss_iter_2_rank_1.pt"]


class Toy(BaseModel):
    """Logistic regression with dropout, in a few modules."""

    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4, 1)
        # What the hooks of a test do to a step.
        self.fault = lambda x, step: x
        self.steps = 0

    def forward(self, inputs, mode):
        self.steps += 1
        x = self.fault(self.linear(self.drop(inputs)), self.steps)
        return {"loss": nn.functional.softplus(x).mean(), "accuracy": (x > 0).float().mean()}


@pytest.fixture
def toy(tmp_path):
    """Makes a runner of a toy model for four iterations."""

    def make(interval=1, fault=None, poison=None, **optim_wrapper):
        class Poison(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                if poison:
                    poison(runner, data_batch)

        torch.manual_seed(0)
        model = Toy()
        model.fault = fault or model.fault
        runner = Runner(
            model,
            str(tmp_path),
            train_dataloader=torch.utils.data.DataLoader(
                [{"inputs": torch.ones(4)} for _ in range(8)], batch_size=2
            ),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}, **optim_wrapper},
            custom_hooks=[StopOnInvalidLoss(interval), Poison()],
            experiment_name=uuid.uuid4().hex,
            default_scope="mmvmamba",
        )
        runner.toy = model
        return runner

    return make


def test_the_step_is_repeated_with_the_same_random_numbers(toy):
    runner = toy()
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    batch = {"inputs": torch.randn(64, 4)}
    states = random_states()
    traced = trace_step(runner.model, batch, runner.optim_wrapper)
    other = trace_step(runner.model, batch, runner.optim_wrapper)
    set_random_states(states)
    logged = runner.model.train_step(batch, runner.optim_wrapper)
    assert traced.losses == {name: value.item() for name, value in logged.items()}
    assert traced.losses["loss"] != other.losses["loss"]
    assert traced.finite
    assert not traced.origins


def test_a_number_made_between_modules_is_placed_between_them(toy):
    runner = toy(fault=lambda x, step: x * NAN)
    with pytest.raises(InvalidLossError, match="all modules' results are finite"):
        runner.train()
    runner = toy()
    runner.toy.linear.register_forward_pre_hook(lambda _, args: (args[0] * NAN,), prepend=True)
    with pytest.raises(InvalidLossError, match=r"linear \(Linear\) was given them, after drop"):
        runner.train()


def test_spoilt_batches_and_weights_are_told_apart(toy):
    def spoil_batch(runner, batch):
        batch["inputs"][1, 2] = NAN

    with pytest.raises(InvalidLossError, match="the batch is not finite: inputs .*1 nan") as error:
        toy(poison=spoil_batch).train()
    assert "look at the annotations" in str(error.value)

    def spoil_weights(runner, batch):
        runner.toy.linear.weight.data[0, 0] = float("inf")

    with pytest.raises(InvalidLossError, match="weights were not finite before.*linear.weight"):
        toy(poison=spoil_weights).train()


def test_a_fault_that_does_not_recur_is_called_that(toy):
    with pytest.raises(InvalidLossError, match="its loss is finite: the fault does not recur"):
        toy(fault=lambda x, step: x * NAN if step == 2 else x).train()


def test_the_batch_is_kept_where_memory_does_not_suffice_to_look(toy, tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(invalid_loss_hook, "trace_step", run_out)
    with pytest.raises(InvalidLossError, match="not enough memory to look: 2 GiB"):
        toy(fault=lambda x, step: x * NAN).train()
    content = replay.read_step(tmp_path / "invalid_loss_iter_1.pt")
    assert torch.equal(content["batch"]["inputs"], torch.ones(2, 4))


def test_every_micro_batch_is_looked_at(toy):
    runner = toy(fault=lambda x, step: x * NAN if step > 2 else x, accumulative_counts=4)
    before = runner.toy.linear.weight.detach().clone()
    with pytest.raises(InvalidLossError, match="loss of iteration 3 "):
        runner.train()
    assert torch.equal(runner.toy.linear.weight, before)


def test_with_an_interval_the_weights_may_be_spoilt_by_then(toy):
    with pytest.raises(InvalidLossError, match="iteration 4 is.*\n.*\n.*weights were not finite"):
        toy(interval=4, fault=lambda x, step: x * NAN if step == 2 else x).train()
    with pytest.raises(ValueError, match="interval=0 must be a positive integer"):
        StopOnInvalidLoss(0)


def test_an_overflow_of_scaled_gradients_is_no_error(toy):
    wrapper = {"type": "mmvmamba.AmpOptimWrapper", "dtype": "float16"}
    runner = toy(**wrapper, loss_scale={"init_scale": 2.0**100})
    before = runner.toy.linear.weight.detach().clone()
    runner.train()
    assert torch.equal(runner.toy.linear.weight, before)
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0**96
    # The check is taken away again.
    assert "update_params" not in vars(runner.optim_wrapper)


def test_float16s_end_is_named_in_the_advice(toy):
    def overflow(runner, batch):
        runner.toy.linear.weight.data.fill_(6e4)

    wrapper = {"type": "mmvmamba.AmpOptimWrapper", "dtype": "float16"}
    with pytest.raises(InvalidLossError, match=r"linear \(Linear\).*float16.*inf") as error:
        toy(poison=overflow, **wrapper).train()
    assert "float16 ends at 65504" in str(error.value)


def test_it_is_on_by_default_and_can_be_switched_off(runner_of):
    hooks = runner_of("mmpretrain", "default_hooks.invalid_loss.interval=7").hooks
    assert [hook.interval for hook in hooks if isinstance(hook, StopOnInvalidLoss)] == [7]
    hooks = runner_of("mmpretrain", "default_hooks.invalid_loss=None").hooks
    assert not any(isinstance(hook, StopOnInvalidLoss) for hook in hooks)
    assert isinstance(HOOKS.build({"type": "mmvmamba.StopOnInvalidLoss"}), StopOnInvalidLoss)


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(UsageError, match="has no iteration, batch"):
        replay.read_step(other)
    other.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="cannot be read"):
        replay.read_step(other)
    torch.save({"batch": run}, other)
    with pytest.raises(CheckpointError, match="contains more than weights"):
        replay.read_step(other)


def test_finite_numbers_are_described_by_the_largest():
    assert describe(torch.tensor([-3.0, 2.0])) == "(2,) float32, up to 3"
    assert describe(torch.ones(0)) == "(0,) float32, up to 0"
