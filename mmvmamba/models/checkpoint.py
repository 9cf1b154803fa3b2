"""Official state dicts and ours: reading, translating and strict loading.

The backbone's parameter names are the official repository's, so a translation only adds or strips
prefixes, and gives files from before its release (all of vanilla VMamba's) the names of today.
Every load reports what became of each key and refuses what it cannot place.
"""

import hashlib
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier
from mmengine.model.weight_init import PretrainedInit
from torch import Tensor, nn

# Where the weights stand in the files we know, in the order of preference: mmengine's own, then
# the official classification files, whose moving average is what the published accuracy belongs to.
STATE_DICT_ENTRIES = ("state_dict", "model_ema", "model")

# The backbone's names in the first code, which the published vanilla files were trained with. The
# classifier's `norm` and `head` stood at the top.
OLD_NAMES = {
    r"(?P<part>patch_embed)\.proj": r"\g<part>.0",
    r"(?P<part>patch_embed)\.norm": r"\g<part>.2",
    r"(?P<part>layers\.\d+\.blocks\.\d+)\.ln_1": r"\g<part>.norm",
    r"(?P<part>layers\.\d+\.blocks\.\d+)\.self_attention": r"\g<part>.op",
}
OLD_MARK = re.compile(r"(^|\.)layers\.\d+\.blocks\.\d+\.self_attention\.")

# What Python's and torch's readers run into in files that are cut short, damaged or something else.
DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError),
    *(ImportError, AssertionError, MemoryError, OverflowError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


# The stem's first convolution, the one weight whose shape follows the images' channels; VMamba's
# and Vim's.
STEMS = ("patch_embed.0.weight", "patch_embed.proj.weight")

Channels = Literal["repeat", "mean", "zeros"]


class CheckpointError(RuntimeError):
    """Raised when a checkpoint cannot be read or does not fit the model."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every key in a load.

    Attributes:
        source: The file or URL.
        entry: The entry of the file that held the weights, '' when the file is the state dict.
        loaded: Keys of the model that were set from the file.
        kept: Keys of the model that the file does not have and that kept their initial value.
        ignored: Keys of the file that belong to another part of a network.
    """

    source: str
    entry: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        if self.entry:
            lines[0] += f" ({self.entry})"
        if self.kept:
            lines.append(f"{len(self.kept)} keep their initial value: {_shorten(self.kept)}")
        if self.ignored:
            lines.append(f"{len(self.ignored)} in the file not used: {_shorten(self.ignored)}")
        return "; ".join(lines)


@dataclass(frozen=True)
class Conversion:
    """A state dict under other names.

    Attributes:
        source: The file or URL.
        entry: The entry of the file that held the weights, '' when the file is the state dict.
        names: From every key of the file to the key written, None where it is left out.
        state: The state dict that is written.
    """

    source: str
    entry: str
    names: dict[str, str | None]
    state: dict[str, Tensor]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The keys of the file that are not written."""
        return tuple(key for key, name in self.names.items() if name is None)


def current_names(keys: Iterable[str]) -> dict[str, str]:
    """Tells the names of today for the keys of any official file, or of ours.

    'module.', which data-parallel wrappers add, goes. Files from before the official release, such
    as vanilla VMamba's, are known by their `self_attention` and get the names of `OLD_NAMES`.

    Returns:
        From each key to its name of today, mostly itself.
    """
    names = {key: key.removeprefix("module.") for key in keys}
    if any(OLD_MARK.search(key) for key in names):
        names = {key: _renamed(name) for key, name in names.items()}
    return names


def _renamed(name: str) -> str:
    for old, new in OLD_NAMES.items():
        found = re.match(rf"(?P<prefix>(backbone\.)?){old}\.", name)
        if found:
            return found["prefix"] + found.expand(new) + name[found.end() - 1 :]
    return re.sub(r"^(norm|head)\.", r"classifier.\1.", name)


def _shorten(keys, most: int = 8) -> str:
    keys = sorted(keys)
    more = f", ... ({len(keys) - most} more)" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def read_checkpoint(source: str | Path) -> dict:
    """Reads a checkpoint on the CPU without running anything from it.

    Args:
        source: A local path, or an http(s) address, whose file is kept in torch.hub's folder.

    Returns:
        What the file holds, tensors on the CPU.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, not a checkpoint, or holds
            objects other than tensors, plain containers and mmengine's own records.
    """
    fetched = "://" in str(source)
    path = _download(str(source)) if fetched else Path(source).expanduser()
    # A file that was fetched once is not fetched again while it is there.
    remedy = f"Delete it and fetch {source} again." if fetched else "Fetch or write it again."
    _check_file(path, remedy)
    # The official files carry their training configuration as a yacs CfgNode, a kind of dict, and
    # Vim's as arguments: both are read as a plain dict and never as another class.
    configurations = ("yacs.config.CfgNode", "argparse.Namespace")
    with torch.serialization.safe_globals([(OrderedDict, name) for name in configurations]):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} was not loaded: it contains more than weights, or it is not a checkpoint. "
                f"{str(error).splitlines()[0]} If you made it yourself, save only its state dict."
            ) from error
        except DAMAGE as error:
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is damaged or incomplete. "
                f"{_reason(error)} {remedy}"
            ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{source} contains a {type(checkpoint).__name__}, expected a dict with a state dict "
            f"(under {', '.join(STATE_DICT_ENTRIES)}) or a state dict itself."
        )
    return checkpoint


def _download(address: str) -> Path:
    """Fetches a file once; other processes of the machine wait for the first."""
    parts = urlparse(address)
    if parts.scheme not in ("http", "https"):
        raise CheckpointError(
            f"checkpoint {address}: only local paths and http(s) addresses can be read. Download "
            "the file and give its path."
        )
    # Files of one name lie at many addresses: those of other data sets, or of other releases.
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "checkpoints" / key / Path(parts.path).name
    # Every launcher sets it. mmengine's get_local_rank needs a group that mmengine never makes.
    if os.environ.get("LOCAL_RANK", "0") == "0" and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {address} could not be downloaded: {error}. Check the address and the "
                "network, or download the file elsewhere and give its path: --cfg-options "
                "load_from=FILE, or model.backbone.init_cfg.checkpoint=FILE for a backbone's."
            ) from error
    barrier()
    return path


def split_pretrained(init_cfg: dict | list[dict] | None) -> tuple[list[dict], list[dict]]:
    """Separates checkpoints to load from other ways of initialising, in mmengine's `init_cfg`.

    mmengine's own loader is not strict and goes on when a file does not fit.

    Returns:
        The settings of type 'Pretrained', and the others.
    """
    listed = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])

    def is_pretrained(cfg: dict) -> bool:
        kind = cfg["type"]
        return kind is PretrainedInit or str(kind).rpartition(".")[2] == "Pretrained"

    return [c for c in listed if is_pretrained(c)], [c for c in listed if not is_pretrained(c)]


def _check_file(path: Path, remedy: str) -> None:
    """Refuses what torch would read without noticing the fault, or with a message of no help."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint {path} {what} (working directory: {Path.cwd()}). "
            "Give the path of a .pth file; training does not start without it."
        )
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        raise CheckpointError(f"checkpoint {path} is empty. {remedy}")
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"checkpoint {path} is a Git LFS pointer, not the file itself. Download the file with: "
            "git lfs pull"
        )
    if begin.lstrip().startswith(b"<"):
        raise CheckpointError(
            f"checkpoint {path} is a web page, not a checkpoint: the download saved a page about "
            f"the file, or an error message. {remedy}"
        )
    try:
        is_zip = zipfile.is_zipfile(path)
        damage = _zip_damage(path) if is_zip else None
    except DAMAGE as error:
        damage = _reason(error)
    if damage:
        raise CheckpointError(f"checkpoint {path} is damaged ({damage}). {remedy}")
    if begin.startswith(b"PK") and not is_zip:
        raise CheckpointError(
            f"checkpoint {path} is incomplete: it ends after {path.stat().st_size} bytes, before "
            f"its list of contents. The download, or saving it, was interrupted. {remedy}"
        )


def _zip_damage(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        # torch writes its files uncompressed. Others could unfold to more than the memory holds.
        packed = [info.filename for info in archive.infolist() if info.compress_type]
        if packed:
            return f"{packed[0]!r} is compressed, which torch does not write"
        name = archive.testzip()
    return name and f"checksum of {name!r} does not match"


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def find_weights(
    checkpoint: Mapping, source: str | Path, entry: str | None = None
) -> tuple[str, Mapping[str, Tensor]]:
    """Finds the weights in what `read_checkpoint` returned, under the file's own keys.

    Args:
        checkpoint: The file's content.
        source: The file's name, for messages.
        entry: Where to look; None for the first of `STATE_DICT_ENTRIES` that is there.

    Returns:
        The entry's name ('' if the checkpoint is a state dict itself) and the state dict.

    Raises:
        CheckpointError: If there is none.
    """
    for name in (*STATE_DICT_ENTRIES, "") if entry is None else (entry,):
        state = checkpoint.get(name) if name else checkpoint
        if isinstance(state, Mapping) and state and all(torch.is_tensor(v) for v in state.values()):
            return name, state
    expected = f"one under {entry}"
    if entry is None:
        expected = f"one under {', '.join(STATE_DICT_ENTRIES)}, or a file that is one"
    raise CheckpointError(
        f"{source} has no state dict: expected {expected}. "
        f"It has: {_shorten(map(str, checkpoint))}."
    )


def find_state_dict(
    checkpoint: Mapping, source: str | Path, entry: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """As `find_weights`, under today's names (see `current_names`)."""
    entry, state = find_weights(checkpoint, source, entry)
    names = current_names(state)
    return entry, {names[key]: value for key, value in state.items()}


def is_official_classifier(state: Iterable[str]) -> bool:
    """Tells whether a state dict's keys are those of VMamba's or Vim's classification model."""
    keys = set(state)
    is_vim = keys >= {"layers.0.mixer.A_b_log", "head.weight"}
    is_vmamba = "patch_embed.0.weight" in keys and any(k.startswith("classifier.") for k in keys)
    return is_vim or is_vmamba


def classifier_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an official classification state dict to that of our `ImageClassifier` configs.

    VMamba's `classifier.*` becomes `head.*` (`VMambaClsHead`), Vim's `head.*` becomes `head.fc.*`
    (`LinearClsHead`), and all else `backbone.*`. The official backbone's `outnorm{i}`, which a
    classifier does not have, are left out.
    """
    names = {key: name_from_official_classifier(key) for key in state}
    return {name: state[key] for key, name in names.items() if name}


def name_from_official_classifier(key: str) -> str | None:
    """Our name of one of an official classification model's parameters; None for `outnorm{i}`."""
    if key.startswith("outnorm"):
        return None
    part, _, name = key.partition(".")
    heads = {"classifier": f"head.{name}", "head": f"head.fc.{name}"}
    return heads.get(part, f"backbone.{key}")


def name_to_official_classifier(key: str) -> str:
    """The official name of one of the parameters of our `ImageClassifier` configs.

    Raises:
        CheckpointError: If the key belongs to neither the backbone nor the head.
    """
    part, _, name = key.partition(".")
    if part not in ("backbone", "head"):
        raise CheckpointError(
            f"key {key!r} belongs neither to the backbone nor to the head: this is not a VMamba "
            "classifier."
        )
    if part == "backbone":
        return name
    return f"head.{name.removeprefix('fc.')}" if name.startswith("fc.") else f"classifier.{name}"


def convert(
    checkpoint: Mapping,
    source: str | Path,
    to: Literal["ours", "official"],
    classifier: bool,
    entry: str | None = None,
) -> Conversion:
    """Renames a file's weights to our configs' keys or to the official repository's.

    Detectors and segmentors have the same keys in both. Nothing is loaded or compared with a model.

    Args:
        checkpoint: What `read_checkpoint` returned.
        source: The file's name, for messages.
        to: Whose keys are wanted.
        classifier: Whether the model is an image classifier.
        entry: Which entry of the file to take; None for the first of `STATE_DICT_ENTRIES`.

    Raises:
        CheckpointError: If the file has no weights, keys that have no place in the official
            classifier, or two keys that would become one.
    """
    entry, state = find_weights(checkpoint, source, entry)
    names: dict[str, str | None] = dict(current_names(state))
    if classifier and to == "official":
        names = {key: name_to_official_classifier(name) for key, name in names.items()}
    elif classifier and is_official_classifier(names.values()):
        names = {key: name_from_official_classifier(name) for key, name in names.items()}
    written = [name for name in names.values() if name is not None]
    twice = [name for name, count in Counter(written).items() if count > 1]
    if twice:
        raise CheckpointError(f"{source} has more than one value for {_shorten(twice)}.")
    converted = {name: state[key] for key, name in names.items() if name is not None}
    return Conversion(str(source), entry, names, converted)


def fit_channels(weight: Tensor, channels: int, how: Channels) -> Tensor:
    """Makes the stem's first weight one for images of other channels.

    Args:
        weight: (C, channels of the file, k, k).
        channels: Of the model's images.
        how: 'repeat' takes the file's channels in turn (for fewer than it has, their mean), 'mean'
            their mean for each; both times the file's channels over the model's, which keeps the
            size of the output. 'zeros' takes the file's as they are, and zero for those behind.

    Raises:
        CheckpointError: If there is no such way, or fewer channels are to be filled up with zeros.
    """
    found = weight.shape[1]
    if how not in get_args(Channels):
        raise CheckpointError(f"in_channels={how!r}: choose from {', '.join(get_args(Channels))}.")
    if how == "zeros":
        if channels < found:
            raise CheckpointError(
                f"in_channels='zeros' adds channels, and {channels} are fewer than the file's "
                f"{found}: choose 'mean'."
            )
        return torch.cat(
            [weight, weight.new_zeros(len(weight), channels - found, *weight.shape[2:])], 1
        )
    if how == "mean" or channels < found:
        weight = weight.mean(1, keepdim=True)
    turns = torch.arange(channels) % weight.shape[1]
    return weight[:, turns] * (found / channels)


def fit_stems(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], how: Channels | None
) -> dict[str, Tensor]:
    """A state dict whose stems are for the model's images; as it is if `how` is None."""
    state = dict(state)
    for key in _other_channels(state, expected) if how else ():
        state[key] = fit_channels(state[key], expected[key].shape[1], how)
    return state


def channels_hint(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], setting: str) -> str:
    """The remedy, if a file's stem is for images of other channels than the model's."""
    for key in _other_channels(state, expected):
        return (
            f" The file is of images with {state[key].shape[1]} channels, the model's have "
            f"{expected[key].shape[1]}: {setting}='repeat' (or 'mean', 'zeros') starts from it "
            "all the same."
        )
    return ""


def _other_channels(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    def is_other(key: str) -> bool:
        if not f".{key}".endswith(tuple(f".{stem}" for stem in STEMS)) or key not in expected:
            return False
        found, wanted = state[key].shape, expected[key].shape
        return len(found) == 4 and found[1] != wanted[1] and found[2:] == wanted[2:]

    return [key for key in state if is_other(key)]


def load_backbone(
    backbone: nn.Module,
    source: str | Path,
    prefix: str | None = None,
    in_channels: Channels | None = None,
    entry: str | None = None,
) -> LoadReport:
    """Loads a backbone's weights, strictly.

    Takes official classification files (`model_ema` before `model`), official and mmengine
    detection, segmentation and classification files (`backbone.*`), and bare state dicts.

    Args:
        backbone: A `Backbone`.
        source: A local path or a URL.
        prefix: Where the backbone stands in the file. Without it, 'backbone.' if the file has such
            keys, else the file's top level.
        in_channels: How a stem for images of other channels is taken, see `fit_channels`; None
            refuses it.
        entry: Which entry of the file to take, such as 'model' where there is a 'model_ema' too;
            None for the first of `STATE_DICT_ENTRIES`.

    Returns:
        What was loaded. The only keys that may keep their initial value are those of its
        `own_parts` (a VMamba's `outnorm{i}`), and only if the file has none of them, as a
        classification file has not.

    Raises:
        CheckpointError: If the file cannot be read, or a key is missing, unknown or of another
            shape. The backbone is then unchanged.
    """
    entry, state = find_state_dict(read_checkpoint(source), source, entry)
    if prefix is None:
        prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
    ignored = [key for key in state if not key.startswith(prefix)]
    state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if not state:
        raise CheckpointError(
            f"{source} has no key that starts with {prefix!r}; it has {_shorten(ignored)}."
        )

    expected = backbone.state_dict()
    foreign = [
        key for key in state if key.startswith(backbone.foreign_parts) and key not in expected
    ]
    ignored += [prefix + key for key in foreign]
    has_own = any(key.startswith(backbone.own_parts) for key in state)
    state = {key: state[key] for key in state if key not in set(foreign)}
    state = fit_stems(state, expected, in_channels)
    missing = [key for key in expected if key not in state]
    kept = [] if has_own else [key for key in missing if key.startswith(backbone.own_parts)]
    missing = [key for key in missing if key not in set(kept)]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
        for key, value in state.items()
        # A 1x1 convolution's weight for a linear layer is taken as it is.
        if key in expected and not fits(value.shape, expected[key].shape)
    ]
    faults = [
        f"{len(keys)} {what}: {_shorten(keys)}"
        for what, keys in (
            ("keys are missing", missing),
            ("keys are unknown", unknown),
            ("shapes differ", shapes),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"{source} does not fit this backbone and nothing was loaded. "
            + "; ".join(faults)
            + ". Check that `arch` and the other arguments are those the file was trained with."
            + channels_hint(state, expected, "in_channels in init_cfg")
        )
    backbone.load_state_dict(state, strict=False)
    return LoadReport(str(source), entry, tuple(state), tuple(kept), tuple(ignored))


def fits(found: torch.Size, expected: torch.Size) -> bool:
    """Tells whether a weight can be loaded: of the same shape, or one that models convert.

    Those are a 1x1 convolution's for a linear layer, and a position embedding of another size.
    """
    if len(expected) == 2:
        return found in (expected, (*expected, 1, 1))
    # (1, C, H, W), and (1, L, C) of Vim.
    is_embedding = len(found) == len(expected) and len(found) in (3, 4) and found[0] == 1
    channels = 1 if len(found) == 4 else 2
    return found == expected or (is_embedding and found[channels] == expected[channels])


def accept_conv_weights(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A hook for `load_state_dict`: linear weights of channels-first files may be 1x1 convolutions.

    Args:
        module: Whose weights are loaded.
        state_dict: What is loaded; changed in place.
        prefix: What stands before the module's own names.
    """
    for name, parameter in module.named_parameters():
        value = state_dict.get(prefix + name)
        if parameter.ndim == 2 and value is not None and value.shape[2:] == (1, 1):
            state_dict[prefix + name] = value.flatten(1)
