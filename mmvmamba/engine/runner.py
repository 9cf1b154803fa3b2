"""mmengine's Runner, strict about weights, exact in resuming, and at home without a GPU."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_world_size, master_only
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook as UpstreamCheckpointHook
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import _ParamScheduler
from mmengine.registry import HOOKS, LOOPS, Registry
from mmengine.runner import EpochBasedTrainLoop as UpstreamEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as UpstreamIterBasedTrainLoop
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmvmamba.engine.agreement import AgreementHook, check_steps
from mmvmamba.engine.checkpoint_hook import UNFINISHED, CheckpointHook
from mmvmamba.engine.data_checks import LeftOutHook, build_dataloader
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.invalid_loss_hook import StopOnInvalidLoss
from mmvmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmvmamba.engine.processes import prepare_launch
from mmvmamba.engine.resume import check_resumable, newest_checkpoint
from mmvmamba.engine.schedules import fit_warm_up
from mmvmamba.engine.seeds import build_train_dataloader
from mmvmamba.engine.wrappers import unwrapped
from mmvmamba.models.checkpoint import (
    Channels,
    CheckpointError,
    channels_hint,
    classifier_from_official,
    find_state_dict,
    fit_stems,
    fits,
    is_official_classifier,
    read_checkpoint,
    split_pretrained,
)
from mmvmamba.registry import RUNNERS


@RUNNERS.register_module()
class StrictRunner(Runner):
    """A Runner that never goes on with weights that failed to load, and resumes exactly.

    `load_from`, `--resume` and the checkpoint of a test must fit the model key by key. Fine-tuning
    with other heads says which parts may differ: `load_ignore` in the config is a list of prefixes
    of keys that keep the model's own values, e.g. `load_ignore=['roi_head.bbox_head.fc_cls']`, and
    `load_in_channels` how a model of other images takes the weights of photographs.

    A training that is resumed ends with the weights that it would have had without the
    interruption, on the CPU bit for bit: see `mmvmamba.engine.seeds` and `mmvmamba.engine.loops`,
    which stand in for mmengine's loops (loops of other makes keep their own ways). Checkpoints
    appear under their names when they are whole.
    """

    # The checkpoint to resume from, between its reading and the moment when its tensors are used.
    _resumed: dict | None = None

    build_dataloader = staticmethod(build_dataloader)

    def setup_env(self, env_cfg: dict) -> None:
        """Starts the process group (on gloo where there is no accelerator), then as mmengine."""
        prepare_launch(self._launcher, (env_cfg.get("dist_cfg") or {}).get("timeout"))
        super().setup_env(env_cfg)

    def set_randomness(
        self, seed: int | None = None, diff_rank_seed: bool = False, deterministic: bool = False
    ) -> None:
        """Seeds the run.

        Args:
            seed: The seed, drawn if None.
            diff_rank_seed: Not used: the processes share the seed, by which they share out the
                data, and each draws its own numbers in every training step.
            deterministic: Use deterministic algorithms alone, and the seed 0 if none is given, so
                that two runs of one config are the same.
        """
        del diff_rank_seed
        if deterministic:
            seed = 0 if seed is None else seed
            # cuBLAS reads it when it starts, and torch refuses to call it without.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().set_randomness(seed, deterministic=deterministic)
        self._randomness_cfg = {"seed": self.seed, "deterministic": deterministic}

    def register_default_hooks(self, hooks: dict[str, Hook | dict] | None = None) -> None:
        """Registers mmengine's default hooks, this package's for checkpoints, and one more.

        `default_hooks.invalid_loss=None` lets a training go on with a loss that is not finite.
        """
        hooks = {"invalid_loss": {}, **(hooks or {})}
        if hooks["invalid_loss"] is None:
            del hooks["invalid_loss"]
        elif isinstance(hooks["invalid_loss"], dict):
            hooks["invalid_loss"] = {"type": StopOnInvalidLoss, **hooks["invalid_loss"]}
        config = hooks.setdefault("checkpoint", {"type": "CheckpointHook", "interval": 1})
        if isinstance(config, dict) and _registered(HOOKS, config) is UpstreamCheckpointHook:
            hooks["checkpoint"] = {**config, "type": CheckpointHook}
        super().register_default_hooks(hooks)
        self.register_hook(LeftOutHook())
        self.register_hook(AgreementHook())

    def train(self) -> nn.Module:
        """Trains, from the beginning or from where the checkpoint to resume from was saved."""
        if self._resume:
            # The data loader is built before mmengine reads the checkpoint, and needs its seed.
            self._find_resumed()
        self._check_start()
        return super().train()

    def _check_start(self) -> None:
        """Refuses processes that begin in different places: their weights would stay different."""
        meta = (self._resumed or {}).get("meta", {})
        starts = all_gather_object((meta.get("epoch", 0), meta.get("iter", 0)))
        if len(set(starts)) > 1:
            places = ", ".join(f"{rank}: {e}, {i}" for rank, (e, i) in enumerate(starts))
            raise UsageError(
                "the processes do not resume from the same checkpoint (process: epoch, iteration "
                f"{places}). All machines must see one work directory, or copies of it."
            )

    def _find_resumed(self) -> None:
        if self._load_from is None:
            path, damaged = newest_checkpoint(self.work_dir)
            for reason in damaged:
                self.logger.warning(f"skipped: {reason}")
            if path is None:
                self.logger.warning(
                    f"no checkpoint in {self.work_dir}: training starts from the beginning."
                )
                self._resume = False
                return
            self._load_from = str(path)
        self._resumed = read_checkpoint(self._load_from)
        check_resumable(self._resumed, self._load_from)
        meta = self._resumed["meta"]
        if meta.get("seed", self.seed) != self.seed:
            self.logger.info(f"random seed {meta['seed']}, as before the interruption")
            self.set_randomness(**{**self._randomness_cfg, "seed": meta["seed"]})

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Builds the training's loop and data loader, which begins where the training does."""
        # A loop of another make may take several loaders, in a dict.
        loader = self._train_dataloader
        if isinstance(loop, dict) and isinstance(loader, dict) and "dataset" in loader:
            loop = dict(loop)
            if "by_epoch" in loop:
                by_epoch = loop.pop("by_epoch")
                loop["type"] = f"{'Epoch' if by_epoch else 'Iter'}BasedTrainLoop"
            kind = _registered(LOOPS, loop)
            meta = (self._resumed or {}).get("meta", {})
            start, by_epoch = 0, True
            if kind in (UpstreamEpochBasedTrainLoop, EpochBasedTrainLoop):
                loop["type"], start = EpochBasedTrainLoop, meta.get("epoch_iter", 0)
            elif kind in (UpstreamIterBasedTrainLoop, IterBasedTrainLoop):
                loop["type"], start, by_epoch = IterBasedTrainLoop, meta.get("iter", 0), False
            self._train_dataloader = build_train_dataloader(loader, self.seed, start, by_epoch)
        loop = super().build_train_loop(loop)
        if isinstance(getattr(loop, "dataloader", None), DataLoader):
            # Schedules are made for the steps, and their errors would be of no help.
            check_steps(loop.dataloader)
        return loop

    def build_param_scheduler(self, scheduler: _ParamScheduler | dict | list) -> list | dict:
        """Builds the schedulers, whose warm-up fits the training: see `fit_warm_up`."""
        if isinstance(scheduler, dict) and "type" not in scheduler:
            # Of several optimizers.
            fitted = {name: self._fit_warm_up(one) for name, one in scheduler.items()}
        else:
            fitted = self._fit_warm_up(scheduler)
        return super().build_param_scheduler(fitted)

    def _fit_warm_up(self, scheduler: _ParamScheduler | dict | list) -> list:
        if isinstance(scheduler, _ParamScheduler) or not isinstance(self._train_loop, BaseLoop):
            return scheduler
        fitted, lines = fit_warm_up(scheduler, self.max_iters, len(self.train_dataloader))
        for line in lines:
            self.logger.warning(line)
        return fitted

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Puts model, optimizer, schedulers and counters where a checkpoint left them."""
        meta = (self._resumed or {}).get("meta", {})
        super().resume(filename, *args, **kwargs)
        if isinstance(self.train_loop, EpochBasedTrainLoop):
            self.train_loop.epoch_iter = meta.get("epoch_iter", 0)
        if self.iter >= self.max_iters:
            self.logger.warning(
                f"nothing is left to train: {filename} has {self.iter} of {self.max_iters} "
                "iterations. For a longer training, raise max_epochs or max_iters."
            )
        before, now = meta.get("processes"), get_world_size()
        if before not in (None, now):
            self.logger.warning(
                f"{filename} was saved by {before} processes and is resumed by {now}: with the "
                "same batch size per process, each step now sees a different number of images."
            )

    @master_only
    def save_checkpoint(
        self, out_dir: str, filename: str, *args, meta: dict | None = None, **kwargs
    ) -> None:
        """Saves a checkpoint, which appears under its name when it is whole.

        Args:
            out_dir: The folder.
            filename: The file's name.
            *args: As mmengine's.
            meta: What else to note; the place within an epoch is added.
            **kwargs: As mmengine's.

        Raises:
            CheckpointError: If the file cannot be written, as on a full disk. Files that were
                there before are as they were.
        """
        meta = {**(meta or {}), "processes": get_world_size()}
        if not kwargs.get("by_epoch", True):
            meta["epoch_iter"] = getattr(self.train_loop, "epoch_iter", 0)
        backend = get_file_backend(out_dir, backend_args=kwargs.get("backend_args"))
        if not isinstance(backend, LocalBackend):
            super().save_checkpoint(out_dir, filename, *args, meta=meta, **kwargs)
            return
        path = Path(out_dir) / filename
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            super().save_checkpoint(out_dir, unfinished.name, *args, meta=meta, **kwargs)
            with unfinished.open("rb") as file:
                # The name must not reach the disk before the content.
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise CheckpointError(
                f"checkpoint {path} was not written: {error.strerror or error}. The training ends "
                "here; earlier checkpoints are intact. Free some space, or give another "
                "--work-dir, and continue with --resume."
            ) from error

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wraps the model for data parallelism, with what the CPU needs where it runs there."""
        if not self.distributed or get_device() != "cpu":
            return super().wrap_model(model_wrapper_cfg, model)
        if self.cfg.get("sync_bn") or any(
            "SyncBatchNorm" in type(m).__name__ for m in model.modules()
        ):
            self.logger.warning(
                "SyncBN does not run on the CPU: its layers are plain BN here, with each "
                "process's own statistics."
            )
            self.cfg.pop("sync_bn", None)
            model = revert_sync_batchnorm(model)
        wrapper = {
            "type": "MMDistributedDataParallel",
            "broadcast_buffers": False,
            "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            **(model_wrapper_cfg or {}),
            "device_ids": None,
        }
        # mmengine asks for it whatever the device.
        os.environ.setdefault("LOCAL_RANK", "0")
        return super().wrap_model(wrapper, model)

    def _maybe_compile(self, target: str) -> None:
        """Compiles the backbone, if the config says `compile=True` or `compile=dict(...)`.

        mmengine would compile the whole step, in which data pre-processors, losses and samplers
        break the graph and every number of boxes compiles it anew. The backbone is one graph, of
        one size at first and of any from the second one on. A dict holds `torch.compile`'s
        arguments.
        """
        options = self.cfg.get("compile")
        backbone = getattr(unwrapped(self.model), "backbone", None)
        if backbone is None or options is None or options is False:
            super()._maybe_compile(target)
            return
        if backbone._compiled_call_impl is not None:
            # Compiled for the training already; the validation runs it too.
            return
        options = {} if options is True else dict(options)
        try:
            backbone.compile(**options)
        except (TypeError, RuntimeError) as error:
            raise UsageError(
                f"compile={options} of the config is not what torch.compile takes: {error}"
            ) from error
        self.logger.info(
            f"{type(backbone).__name__} goes through torch.compile({options}): the first "
            "iterations may take minutes."
        )

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = "cpu",
        strict: bool = True,
        revise_keys: Sequence = (),
    ) -> dict:
        """Loads a checkpoint, strictly.

        Args:
            filename: A path, or a URL. Official classification files are taken as well.
            map_location: Not used: files are read on the CPU, tensors move as they are copied.
            strict: Not used: loading is always strict, `load_ignore` apart.
            revise_keys: Not used: 'module.' prefixes are always stripped.

        Returns:
            The file's content.

        Raises:
            CheckpointError: If the file cannot be read, does not fit the model, or is to be resumed
                from and holds weights alone. The model is unchanged.
        """
        del map_location, strict, revise_keys
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is None:
            checkpoint = read_checkpoint(filename)
        if isinstance(checkpoint.get("meta"), dict):
            # mmengine's resume would run the config, which is Python, that old files have here.
            checkpoint["meta"].pop("config", None)
        checkpoint["state_dict"] = model_weights(checkpoint, filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        begins = not self._resume
        ignore = (self.cfg.get("load_ignore") if begins else None) or ()
        channels = self.cfg.get("load_in_channels") if begins else None
        loaded = load_strictly(self.model, checkpoint["state_dict"], filename, ignore, channels)
        self._has_loaded = True
        self.logger.info(f"{loaded} tensors loaded from {filename}")
        return checkpoint

    def _init_model_weights(self) -> None:
        """Initialises the model, unless every weight is about to come from a checkpoint.

        A training that is resumed must not depend on the pretrained file that it once began with.
        """
        if self._resume:
            return
        model = unwrapped(self.model)
        configured = getattr(model, "init_cfg", None)
        pretrained, others = split_pretrained(configured)
        if not pretrained:
            super()._init_model_weights()
            return
        model.init_cfg = others
        super()._init_model_weights()
        model.init_cfg = configured
        for cfg in pretrained:
            state = model_weights(read_checkpoint(cfg["checkpoint"]), cfg["checkpoint"])
            prefix = f"{cfg['prefix'].rstrip('.')}." if cfg.get("prefix") else ""
            state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            ignore, channels = self.cfg.get("load_ignore") or (), cfg.get("in_channels")
            load_strictly(model, state, cfg["checkpoint"], ignore, channels)


def _registered(registry: Registry, config: dict) -> type | None:
    """The class that a config names, None if there is none."""
    kind = config.get("type")
    return registry.get(kind) if isinstance(kind, str) else kind


def model_weights(checkpoint: dict, source: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint's content, under our keys."""
    _, state = find_state_dict(checkpoint, source)
    return classifier_from_official(state) if is_official_classifier(state) else state


def load_strictly(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    ignore: str | Sequence[str] = (),
    in_channels: Channels | None = None,
) -> int:
    """Copies a state dict into a model that must have the same keys and shapes.

    Args:
        model: The model, which may be wrapped for data parallelism or test-time augmentation.
        state: The weights.
        source: Where they come from, for messages.
        ignore: Prefixes of keys that are left alone, in the model and in the file.
        in_channels: How a stem for images of other channels is taken, see `fit_channels`; None
            refuses it.

    Returns:
        The number of tensors copied.

    Raises:
        CheckpointError: If keys are missing, unknown or of another shape, or none is left.
    """
    if isinstance(ignore, str):
        ignore = (ignore,)
    model = unwrapped(model)
    expected = model.state_dict()
    for prefix in ignore:
        if not any(key.startswith(prefix) for key in (*expected, *state)):
            raise CheckpointError(
                f"load_ignore names {prefix!r}, but neither the model nor {source} has such "
                "parameters: correct it, or leave it out."
            )
    prefixes = tuple(ignore)
    expected = {key: value for key, value in expected.items() if not key.startswith(prefixes)}
    state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    state = fit_stems(state, expected, in_channels)
    mismatches = {
        # Files written before batch norm counted its batches have no counter.
        "missing in the file": [
            key for key in expected if key not in state and not key.endswith("num_batches_tracked")
        ],
        "unknown to the model": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(value.shape)}, the model's is {tuple(expected[key].shape)}"
            for key, value in state.items()
            if key in expected and not fits(value.shape, expected[key].shape)
        ],
    }
    faults = [
        f"  {len(keys)} {what}:\n    " + "\n    ".join(_first(keys))
        for what, keys in mismatches.items()
        if keys
    ]
    if not faults and not state:
        faults = ["  no key is left after load_ignore."]
    if faults:
        raise CheckpointError(
            f"{source} does not fit the model; nothing is trained or tested with it:\n"
            + "\n".join(faults)
            + "\nCheck that the config is the one the file belongs to. To fine-tune with other "
            "heads, name what may differ, e.g. --cfg-options \"load_ignore=['roi_head']\"."
            + channels_hint(state, expected, "load_in_channels (in init_cfg: in_channels)")
        )
    model.load_state_dict(state, strict=False)
    return len(state)


def _first(keys: list[str], most: int = 20) -> list[str]:
    return keys if len(keys) <= most else [*keys[:most], f"... and {len(keys) - most} more"]
