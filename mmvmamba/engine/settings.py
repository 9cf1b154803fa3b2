"""Settings: reading configs, overriding them, and telling of what nothing reads.

mmengine merges whatever it is given. A setting of an older OpenMMLab or a slip of the pen would be
without effect, and without a word.
"""

import argparse
import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine import registry as registries
from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import type_name
from mmvmamba.models import VMamba

# The keys of a config that something reads: the runner's arguments, and what runners, hooks and
# tools, upstream's and ours, look up beside them.
KNOWN = {*inspect.signature(Runner.__init__).parameters} - {"self", "cfg"} | {
    *("activation_checkpointing", "compile", "custom_imports", "efficient_conv_bn_eval"),
    *("find_unused_parameters", "load_ignore", "load_in_channels", "model_wrapper_cfg"),
    *("runner_type", "strategy", "sync_bn", "tta_cfg", "tta_model", "tta_pipeline"),
}

# What the settings of OpenMMLab's first generation are called today.
OLD_NAMES = {
    "data.samples_per_gpu": "train_dataloader.batch_size",
    "data.workers_per_gpu": "train_dataloader.num_workers",
    "data.train": "train_dataloader.dataset",
    "data.val": "val_dataloader.dataset",
    "data.test": "test_dataloader.dataset",
    "optimizer_config.grad_clip": "optim_wrapper.clip_grad",
    "optimizer": "optim_wrapper.optimizer",
    "lr_config": "param_scheduler",
    "runner": "train_cfg",
    "total_epochs": "train_cfg.max_epochs",
    "evaluation.interval": "train_cfg.val_interval",
    "evaluation": "val_evaluator",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config": "default_hooks.logger",
    "seed": "randomness.seed",
}

# Settings that are no arguments of the class that `type` names, by the place of the settings.
BESIDE_ARGUMENTS = {
    "optim_wrapper": {"constructor", "optimizer", "paramwise_cfg"},
    "param_scheduler": {"convert_to_iter_based"},
    "default_hooks": {"priority"},
    "custom_hooks": {"priority"},
}
LOOPS = {"train_cfg": "TrainLoop", "val_cfg": "ValLoop", "test_cfg": "TestLoop"}
DEFAULT_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "logger": "LoggerHook",
    "param_scheduler": "ParamSchedulerHook",
    "checkpoint": "CheckpointHook",
    "invalid_loss": "mmvmamba.StopOnInvalidLoss",
}
# Where the classes of settings are registered, by the end of a key on the way to them.
REGISTRIES = {
    "pipeline": registries.TRANSFORMS,
    "transforms": registries.TRANSFORMS,
    "dataset": registries.DATASETS,
    "datasets": registries.DATASETS,
    "sampler": registries.DATA_SAMPLERS,
    "optimizer": registries.OPTIMIZERS,
    "optim_wrapper": registries.OPTIM_WRAPPERS,
    "param_scheduler": registries.PARAM_SCHEDULERS,
    "hooks": registries.HOOKS,
    "evaluator": registries.METRICS,
    "visualizer": registries.VISUALIZERS,
    "cfg": registries.LOOPS,
    "model": registries.MODELS,
    "preprocessor": registries.MODELS,
}

WHAT_CAN_BE_GIVEN = (
    "a value is a number, a text, True, False, None, or a list of these: [1,2] or (1,2), without "
    "spaces. The settings of a dict are given one by one, as model.backbone.arch.dims=96; "
    "KEY._delete_=True before them drops what KEY was"
)


class SettingsAction(DictAction):
    """mmengine's parser of KEY=VALUE, which says what a value can be."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        """Adds the settings to the option's dict."""
        for text in values:
            key, equals, value = text.partition("=")
            if not (key and equals) or re.match(r"[\[('\"]*(dict\(|\{.)", value.replace("{}", "")):
                raise argparse.ArgumentError(
                    self, f"{text!r} is not KEY=VALUE: {WHAT_CAN_BE_GIVEN}"
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except (RecursionError, AssertionError) as error:
            raise argparse.ArgumentError(
                self, f"{' '.join(values)!r} is not KEY=VALUE: {WHAT_CAN_BE_GIVEN}"
            ) from error


class ConfigSource:
    """A config file as text: which variables it sets.

    Args:
        path: The file. Of one that is not Python, nothing is known.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
        try:
            tree = ast.parse(self.text)
        except SyntaxError:
            # mmengine's own place holders are none of Python's.
            tree = ast.parse("")
        self._values = {
            (statement.targets[0].id, number): statement.value
            for number, statement in enumerate(tree.body)
            if isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        }
        read = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        names = {name for name, _ in self._values if not name.startswith("_")} - KNOWN
        # Relative imports, and the names of files, would lead elsewhere in another folder.
        fixed = "read_base" in read or re.search(r"\{\{\s*file", self.text)
        self.inherits = "read_base" in read or any(name == "_base_" for name, _ in self._values)
        self.variables = set() if fixed else names
        self.unread = names - read

    def load(self, values: Mapping[str, object]) -> Config:
        """Loads the config with other values of its variables, from which the rest is computed."""
        text, lines = self.text.encode(), self.text.encode().splitlines(keepends=True)

        def place(line: int, column: int) -> int:
            return sum(map(len, lines[: line - 1])) + column

        for (name, _), node in reversed(self._values.items()):
            if name in values:
                new = repr(values[name])
            elif name == "_base_":
                new = repr(self._absolute(ast.literal_eval(node)))
            else:
                continue
            begin = place(node.lineno, node.col_offset)
            end = place(node.end_lineno, node.end_col_offset)
            text = text[:begin] + new.encode() + text[end:]
        with TemporaryDirectory() as folder:
            copy = Path(folder) / self.path.name
            copy.write_bytes(text)
            cfg = Config.fromfile(copy)
        object.__setattr__(cfg, "_filename", str(self.path))
        return cfg

    def _absolute(self, bases: str | Sequence[str]) -> list[str]:
        bases = [bases] if isinstance(bases, str) else bases
        folder = self.path.absolute().parent
        return [base if "::" in base else str(folder / base) for base in bases]


def read_config(
    load: Callable[[], Config], overrides: Mapping[str, object]
) -> tuple[Config, list[str]]:
    """Loads a config and overrides its settings.

    A variable of the file takes its value before the file is evaluated, so that what is computed
    from it follows. Other settings are replaced afterwards, as mmengine does.

    Args:
        load: Loads the config.
        overrides: Values by key, as `--cfg-options` gives them.

    Returns:
        The config, and what is to be told of settings without effect.

    Raises:
        UsageError: If a setting cannot be what the config or the command line makes of it.
    """
    try:
        cfg = load()
        source = ConfigSource(Path(cfg.filename))
        variables = {key: value for key, value in overrides.items() if key in source.variables}
        if variables:
            cfg = source.load(variables)
    except TypeError as error:
        _explain_not_inherited(error)
        raise
    notices = [_unread_in_file(cfg, source, name) for name in _suspects(cfg, source)]
    overrides = {key: value for key, value in overrides.items() if key not in variables}
    new = {path: _first_new_key(cfg, path.split(".")) for path in overrides}
    try:
        cfg.merge_from_dict(dict(overrides))
    except (TypeError, LookupError, AttributeError) as error:
        raise _not_merged(overrides, error) from error
    for path, depth in new.items():
        keys = path.split(".")
        if keys[0] not in KNOWN:
            near = nearest(cfg, path)
            what = "nothing reads it"
            if depth != 0:
                what = f"{keys[0]} is a variable, and what is made of it has been made"
            notices.append(f"--cfg-options {path} has no effect: {what}.{near}")
        elif depth is not None:
            where, key = keys[:depth], keys[depth]
            near = unknown_setting(cfg, where, key)
            if near is not None:
                notices.append(
                    f"--cfg-options {path}: {'.'.join(where)} has no setting {key!r}.{near}"
                )
    _check_backbones(cfg.get("model"), "model")
    return cfg, notices


def _explain_not_inherited(error: TypeError) -> None:
    found = re.match(r"(\w+)=.* cannot inherit from base .* <class '(\w+)'>", str(error), re.DOTALL)
    if found:
        key, kind = found.groups()
        raise UsageError(
            f"{key} is a dict in the config, and in the one that it inherits from it is a {kind}. "
            f"To replace it, write {key}=dict(_delete_=True, ...)."
        ) from error


def _not_merged(overrides: Mapping[str, object], error: Exception) -> UsageError:
    text = f"--cfg-options {' '.join(overrides)}: {error}"
    if "cannot inherit from base" in str(error):
        key = str(error).partition("=")[0]
        path = next((p for p in overrides if f".{key}." in f".{p}"), key)
        path = f".{path}".partition(f".{key}.")[0].lstrip(".")
        path = f"{path}.{key}".lstrip(".")
        text = f"--cfg-options: {path} is no dict. To make it one, put {path}._delete_=True first."
    elif isinstance(error, TypeError | AttributeError):
        text += ". An element of a list is named by its number, as param_scheduler.0.end."
    return UsageError(text)


def _first_new_key(cfg: Config, keys: Sequence[str]) -> int | None:
    """Which key of a path, counted from 0, the config does not have yet; None if it has all."""
    node = cfg
    for depth, key in enumerate(keys):
        if isinstance(node, dict | Config):
            if key not in node:
                return depth
            node = node[key]
        elif isinstance(node, list | tuple) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            # Merging says what is wrong.
            return None
    return None


def _suspects(cfg: Config, source: ConfigSource) -> list[str]:
    """The variables of a file that nothing in it reads, which no other file can read either.

    A config that was dumped, or made by hand in one piece, has the variables of all that it was
    made of: there, only what looks like a slip of the pen.
    """
    names = sorted(name for name in source.unread if name in cfg)
    if source.inherits:
        return names
    return [name for name in names if difflib.get_close_matches(name, KNOWN, 1, cutoff=0.9)]


def _unread_in_file(cfg: Config, source: ConfigSource, name: str) -> str:
    return f"{source.path.name} sets {name}, which nothing reads.{nearest(cfg, name)}"


def nearest(cfg: Config, path: str) -> str:
    """Names what a setting without effect may stand for, as the end of a message; '' if unknown."""
    for old, new in OLD_NAMES.items():
        if path == old or path.startswith(f"{old}."):
            return f" It is {new}{path[len(old) :]} today."
    paths = list(_paths({key: value for key, value in cfg.items() if key in KNOWN}))
    same_end = sorted(
        (one for one in paths if one.endswith(f".{path}")), key=lambda one: one.count(".")
    )
    near = same_end[:1] or difflib.get_close_matches(path, paths, 1, cutoff=0.75)
    near = near or difflib.get_close_matches(path.split(".", maxsplit=1)[0], KNOWN, 1, cutoff=0.75)
    return f" Did you mean {near[0]}?" if near else ""


def _paths(node, prefix: str = "") -> Iterator[str]:
    """Every key of nested dicts, with those around it."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def unknown_setting(cfg: Config, where: Sequence[str], key: str) -> str | None:
    """Tells whether a place in a config has no setting of a name.

    Args:
        cfg: The config, with the setting.
        where: The keys that lead to the place.
        key: The setting.

    Returns:
        None if it has, or may have; else a hint, which may be empty.
    """
    node = cfg
    for step in where:
        node = node[int(step)] if isinstance(node, list | tuple) else node[step]
    if key == "type" or key.startswith("_") or not isinstance(node, dict):
        return None
    others = [one for one in node if one != key]
    known = _arguments(cfg, where, node)
    if known is None:
        # Whatever reads it may look for more than there is, but not for what is so like it.
        near = difflib.get_close_matches(key, others, 1, cutoff=0.85)
        return f" Did you mean {near[0]}?" if near else None
    if key in known:
        return None
    near = difflib.get_close_matches(key, {*known, *others}, 1)
    return f" Did you mean {near[0]}?" if near else f" It has {', '.join(sorted(known))}."


def _arguments(cfg: Config, where: Sequence[str], node: Mapping) -> set[str] | None:
    """The settings that a place in a config can have; None if that cannot be told."""
    first, last = where[0], where[-1]
    if len(where) == 1 and first.endswith("_dataloader"):
        return {*inspect.signature(DataLoader).parameters, "num_batch_per_epoch"}
    if len(where) == 1 and first == "default_hooks":
        return set(DEFAULT_HOOKS) | {"visualization"}
    if first == "randomness":
        return {*inspect.signature(Runner.set_randomness).parameters} - {"self"}
    if first == "auto_scale_lr":
        return {"enable", "base_batch_size"}
    kind = node.get("type")
    if first == "default_hooks" and len(where) == 2:
        kind = kind or DEFAULT_HOOKS.get(last)
    if len(where) == 1 and first == "optim_wrapper":
        kind = kind or OptimWrapper
    if len(where) == 1 and first in LOOPS and not kind:
        by_epoch = node.get("by_epoch", True) and "max_iters" not in node
        prefix = ("EpochBased" if by_epoch else "IterBased") if first == "train_cfg" else ""
        kind = f"{prefix}{LOOPS[first]}"
    if isinstance(kind, str):
        kind = _find_class(cfg, where, kind, node.get("_scope_"))
    names = _signature(kind)
    if names is None:
        return None
    beside = BESIDE_ARGUMENTS.get(first, set()) if len(where) <= 2 else set()
    return names | beside | ({"by_epoch"} if first == "train_cfg" else set())


def _find_class(cfg: Config, where: Sequence[str], kind: str, scope: str | None):
    for step in reversed(where):
        for end, registry in REGISTRIES.items():
            if step.endswith(end):
                return _get(registry, kind, scope or cfg.get("default_scope"))
    return None


def _get(registry: Registry, kind: str, scope: str | None):
    with registry.switch_scope_and_registry(scope) as found:
        return found.get(kind)


def _signature(kind) -> set[str] | None:
    """The names of a class's arguments, its parents' too where it hands them on."""
    if not isinstance(kind, type):
        return None
    names: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None


def _check_backbones(node, where: str) -> None:
    """Refuses arguments that VMamba does not have, wherever one is in a model."""
    pairs: Iterable = ()
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list | tuple):
        pairs = enumerate(node)
    for key, value in pairs:
        _check_backbones(value, f"{where}.{key}")
    if not isinstance(node, dict) or type_name(node) != VMamba.__name__:
        return
    known = [*inspect.signature(VMamba).parameters]
    for key in node:
        if key not in (*known, "type", "_scope_"):
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]}?" if near else f" It has {', '.join(known)}."
            raise UsageError(f"{where}: VMamba has no argument {key!r}.{hint}")
