"""What mmengine and PyTorch do for nothing, done once or not at all: half of a tiny training.

Processes that are started cold do it all.
"""

import functools
import re
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, config, utils
from torch.nn import init

PROJECT = Path(__file__).resolve().parents[1]


def quicken() -> None:
    """Where a `package::` config lies and what it says is found once; configs are not laid out.

    For every such name, mmengine imports a package anew and reads all metafiles of the other. The
    text of a config goes through yapf for every log and every checkpoint, half a second each time.
    Tensors without values get none either, which PyTorch works out for a millisecond each.
    """
    utils.load = functools.cache(utils.load)
    config.is_installed = functools.cache(config.is_installed)
    find, read = Config._get_cfg_path, Config._file2dict
    find_once, read_once = functools.cache(find), functools.cache(read)

    def path(cfg_path, filename):
        return find_once(cfg_path, "") if "::" in cfg_path else find(cfg_path, filename)

    def contents(filename, *args, **options):
        # Of installed packages alone: others' files change.
        if "site-packages" in str(filename):
            return deepcopy(read_once(filename, *args, **options))
        return read(filename, *args, **options)

    Config._get_cfg_path, Config._file2dict = staticmethod(path), staticmethod(contents)
    config.FormatCode = lambda text, **_: (text, True)

    fill = init._no_grad_trunc_normal_
    init._no_grad_trunc_normal_ = lambda tensor, *args, **options: (
        tensor if tensor.is_meta else fill(tensor, *args, **options)
    )


def read_upstreams_configs() -> None:
    """Reads what the sample configs inherit from other projects, for forks of this process."""
    for sample in (PROJECT / "configs/sample").glob("*.py"):
        for name in re.findall(r'"((?:mmdet|mmseg|mmpretrain)::[^"]+)"', sample.read_text()):
            # OneDL's mmengine does not find OneDL's packages before mmvmamba is imported.
            with suppress(ModuleNotFoundError):
                Config.fromfile(Config._get_cfg_path(name, "")[0])
