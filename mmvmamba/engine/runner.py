"""mmengine's Runner, strict about weights and able to run several processes without a GPU."""

import os
from collections.abc import Callable, Sequence

from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvmamba.compat import mend_inductor_strides
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.launch import prepare_launch
from mmvmamba.models.checkpoint import (
    CheckpointError,
    classifier_from_official,
    find_state_dict,
    fits,
    is_official_classifier,
    read_checkpoint,
    split_pretrained,
)
from mmvmamba.models.layers import BatchNorm

# What mmengine's checkpoints hold beside the weights and a training cannot go on without.
RESUME_ENTRIES = ("meta", "message_hub", "optimizer")


class StrictRunner(Runner):
    """A Runner that never goes on with weights that failed to load.

    `load_from`, `--resume` and the checkpoint of a test must fit the model key by key. Fine-tuning
    with other heads says which parts may differ: `load_ignore` in the config is a list of prefixes
    of keys that keep the model's own values, e.g. `load_ignore=['roi_head.bbox_head.fc_cls']`.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Starts the process group (on gloo where there is no accelerator), then as mmengine."""
        prepare_launch(self._launcher, (env_cfg.get("dist_cfg") or {}).get("timeout"))
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wraps the model for data parallelism, with what the CPU needs where it runs there."""
        if self.cfg.get("sync_bn") and any(isinstance(m, BatchNorm) for m in model.modules()):
            raise UsageError(
                "sync_bn would replace VMamba's batch norms, which are channels-last, by ones that "
                "are not: leave sync_bn out of the config, or use norm='ln'."
            )
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
        break the graph and every number of boxes compiles it anew. The backbone is one graph; in
        training PyTorch 2.11 compiles it anew for each size, up to its limit of eight, and runs
        further sizes as they are, so it pays for crops of one size. A dict holds `torch.compile`'s
        options.
        """
        options = self.cfg.get("compile")
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        backbone = getattr(model, "backbone", None)
        if backbone is None or options is None or options is False:
            super()._maybe_compile(target)
            return
        if backbone._compiled_call_impl is not None:
            # Compiled for the training already; the validation runs it too.
            return
        mend_inductor_strides()
        options = {} if options is True else dict(options)
        backbone.compile(**options)
        self.logger.info(
            f"{type(backbone).__name__} goes through torch.compile({options}): the first "
            "iterations of every image size take minutes."
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
        checkpoint = read_checkpoint(filename)
        missing = [entry for entry in RESUME_ENTRIES if entry not in checkpoint]
        if self._resume and missing:
            raise CheckpointError(
                f"{filename} has no {', '.join(missing)}: it holds weights, not the state of a "
                "training, and cannot be resumed from. To start a new training from its weights: "
                f"--cfg-options load_from={filename}"
            )
        checkpoint["state_dict"] = model_weights(checkpoint, filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        ignore = () if self._resume else self.cfg.get("load_ignore") or ()
        loaded = load_strictly(self.model, checkpoint["state_dict"], filename, ignore)
        self._has_loaded = True
        self.logger.info(f"{loaded} tensors loaded from {filename}")
        return checkpoint

    def _init_model_weights(self) -> None:
        """Initialises the model, unless every weight is about to come from a checkpoint.

        A training that is resumed must not depend on the pretrained file that it once began with.
        """
        if self._resume:
            return
        model = self.model.module if is_model_wrapper(self.model) else self.model
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
            load_strictly(model, state, cfg["checkpoint"], self.cfg.get("load_ignore") or ())


def model_weights(checkpoint: dict, source: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint's content, under our keys."""
    _, state = find_state_dict(checkpoint, source)
    return classifier_from_official(state) if is_official_classifier(state) else state


def load_strictly(
    model: nn.Module, state: dict[str, Tensor], source: str, ignore: str | Sequence[str] = ()
) -> int:
    """Copies a state dict into a model that must have the same keys and shapes.

    Args:
        model: The model, which may be wrapped for data parallelism or test-time augmentation.
        state: The weights.
        source: Where they come from, for messages.
        ignore: Prefixes of keys that are left alone, in the model and in the file.

    Returns:
        The number of tensors copied.

    Raises:
        CheckpointError: If keys are missing, unknown or of another shape, or none is left.
    """
    if isinstance(ignore, str):
        ignore = (ignore,)
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
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
            "heads, name what may differ, e.g. --cfg-options \"load_ignore=['roi_head']\""
        )
    model.load_state_dict(state, strict=False)
    return len(state)


def _first(keys: list[str], most: int = 20) -> list[str]:
    return keys if len(keys) <= most else [*keys[:most], f"... and {len(keys) - most} more"]
