"""Hooks of the trainings under test, which import this file by its name."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.dist import all_gather, all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel


@HOOKS.register_module()
class CurveRecorder(Hook):
    """Writes to `curves.jsonl` each step's loss, the mean over the processes, norm and rate."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = torch.as_tensor(outputs["loss"]).detach().double()
        all_reduce(loss, "mean")
        if get_rank() == 0:
            logged = {
                name: runner.message_hub.get_scalar(f"train/{name}").current()
                for name in ("grad_norm", "lr")
            }
            line = {"iter": runner.iter, "loss": loss.item(), **logged}
            with (Path(runner.work_dir) / "curves.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


@HOOKS.register_module()
class Fault(Hook):
    """Makes something die in process 1 before a step, in the first attempt or in every one.

    Args:
        kind: 'exception', 'kill', 'loader' (a data loader's worker is killed) or 'every' (as
            'kill', in every attempt).
        at: The step.
    """

    def __init__(self, kind: str, at: int):
        self.kind, self.at = kind, at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != self.at or get_rank() != 1:
            return
        if self.kind != "every" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            return
        (Path(runner.work_dir) / "fault").write_text(str(time.time()))
        if self.kind == "exception":
            raise RuntimeError("made to fail")
        if self.kind == "loader":
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class ShardRecorder(Hook):
    """Writes to `shards.json` in how many units a model is sharded and what each process has."""

    def before_train(self, runner):
        here = sum(parameter.numel() for parameter in runner.model.parameters())
        units = FullyShardedDataParallel.fsdp_modules(runner.model)
        with FullyShardedDataParallel.summon_full_params(runner.model, writeback=False):
            whole = sum(parameter.numel() for parameter in runner.model.parameters())
        everyone = all_gather(torch.tensor(here))
        if get_rank() == 0:
            found = {"units": len(units), "here": [int(one) for one in everyone], "whole": whole}
            (Path(runner.work_dir) / "shards.json").write_text(json.dumps(found))
