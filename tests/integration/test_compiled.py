"""`compile=` in a config: the backbone is compiled, in each of the three tasks."""

import itertools
import math

import pytest
import torch
from tiny import TASKS, command_line, scalars

from mmvmamba.engine import cli
from mmvmamba.engine.errors import UsageError
from mmvmamba.models import VMamba

# The graphs of the compiler without its code generation, which takes minutes on a CPU: those of the
# forward pass, or of both. Tasks differ in what stands around the backbone, which is not compiled.
SHORT = {("mmpretrain", "aot_eager")}
CASES = [
    pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow)
    for case in itertools.product(TASKS, ("eager", "aot_eager"))
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_compiled_training(name, backend, project, sample_data, tmp_path, monkeypatch):
    task = TASKS[name]
    compiled = []
    original = torch.nn.Module.compile

    def record(module, *args, **options):
        compiled.append((type(module).__name__, options))
        original(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", record)
    arguments = [*command_line(task, project, sample_data, tmp_path), f"compile.backend={backend}"]
    if name == "mmpretrain":
        # The other tasks' necks need four stages.
        arguments += ["model.backbone.arch.depths=(1,)", "model.backbone.out_indices=(0,)"]
        arguments += ["model.head.in_channels=16"]
    cli.train(cli.parse_train_arguments(arguments))
    # Once, for the training and its validation.
    assert [(name, options["backend"]) for name, options in compiled] == [("VMamba", backend)]
    losses = [line["loss"] for line in scalars(tmp_path) if "loss" in line]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    keys = torch.load(tmp_path / task.last, weights_only=True)["state_dict"]
    assert "backbone.patch_embed.0.weight" in keys


@pytest.mark.parametrize("value", [{}, True, {"backend": "eager"}])
def test_only_the_backbone_is_compiled(value, project, sample_data, tmp_path, monkeypatch):
    """Without running what was compiled."""
    compiled = []
    monkeypatch.setattr(
        VMamba, "compile", lambda module, **options: compiled.append((module, options))
    )
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("not the whole step"))
    runner = build_runner(project, sample_data, tmp_path)
    runner.cfg.compile = value
    runner._maybe_compile("train_step")
    assert compiled == [(runner.model.backbone, {} if value is True else value)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "fast"}, "Unrecognized mode=fast"),
        ({"backend": "fast"}, "Invalid backend"),
        ({"speed": "fast"}, "unexpected keyword argument 'speed'"),
        ({"options": {"fast": True}}, "Unexpected optimization option fast"),
    ],
    ids=["mode", "backend", "argument", "option"],
)
def test_what_torch_compile_does_not_take(options, reason, project, sample_data, tmp_path):
    runner = build_runner(project, sample_data, tmp_path)
    runner.cfg.compile = options
    with pytest.raises(
        UsageError, match=f"of the config is not what torch.compile takes.*{reason}"
    ):
        runner._maybe_compile("train_step")


def build_runner(project, sample_data, tmp_path, *options):
    arguments = command_line(TASKS["mmpretrain"], project, sample_data, tmp_path)
    return cli.build_runner(cli.train_config(cli.parse_train_arguments([*arguments, *options])))
