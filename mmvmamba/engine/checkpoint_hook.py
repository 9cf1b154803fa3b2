"""Keeping the newest checkpoints and the best, and at every moment a whole one."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import BaseStorageBackend, LocalBackend
from mmengine.hooks import CheckpointHook as UpstreamCheckpointHook
from mmengine.runner import Runner

from mmvmamba.registry import HOOKS

# Ends a checkpoint's name while it is written.
UNFINISHED = ".part"


@HOOKS.register_module()
class CheckpointHook(UpstreamCheckpointHook):
    """mmengine's hook, which removes an outdated checkpoint only when the new one is written.

    mmengine's removes it before: with `max_keep_ckpts=1`, or for the best checkpoint, a process
    that ends while it writes leaves none.
    """

    def before_train(self, runner: Runner) -> None:
        """Sets the hook up, and removes what an interruption left half written."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend) and is_main_process():
            for unfinished in Path(self.out_dir).glob(f"*{UNFINISHED}"):
                unfinished.unlink()
        self.file_backend = _PatientBackend(self.file_backend)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        if not is_main_process():
            return
        best = getattr(self, "best_ckpt_path_dict", {}).values()
        # Resumed behind its last validation, a training writes the same best file once more.
        self.file_backend.remove_now(
            except_for={self.last_ckpt, getattr(self, "best_ckpt_path", None), *best}
        )


class _PatientBackend:
    """A storage backend that notes what it is told to remove, and removes it later."""

    def __init__(self, backend: BaseStorageBackend):
        self._backend = backend
        self._outdated: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.append(path)

    rmtree = remove

    def remove_now(self, except_for: set[str | None]) -> None:
        outdated, self._outdated = self._outdated, []
        for path in outdated:
            if path in except_for:
                continue
            if self._backend.isdir(path):
                self._backend.rmtree(path)
            elif self._backend.isfile(path):
                self._backend.remove(path)
