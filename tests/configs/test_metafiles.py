"""What the metafiles say agrees with the configs and with the code."""

import pytest
import yaml
from mmengine.config import Config
from zoo import CONFIGS, PROJECT, load

from mmvmamba.analysis.flops import build_structure
from mmvmamba.models import VMamba

METAFILES = sorted((PROJECT / "configs").rglob("metafile.yml"))
ENTRIES = [entry for path in METAFILES for entry in yaml.safe_load(path.read_text())["Models"]]
SAMPLES = PROJECT / "configs/sample"
RELEASES = (
    "https://github.com/MzeroMiko/VMamba/releases/download/",
    "https://huggingface.co/hustvl/Vim-",
)

RELEASED = Config.fromfile(PROJECT / "configs/_base_/weights.py")
WEIGHTS = {"VMamba": RELEASED.vmamba_weights, "Vim": RELEASED.vim_weights}

COLLECTIONS = {
    "mmvmamba.VMamba": "VMamba",
    "mmvmamba.VisionMamba": "Vim",
    "mmvmamba.NAT": "NAT",
    "mmvmamba.S4NDViT": "S4ND",
    "mmvmamba.S4NDConvNeXt": "S4ND",
}
NAT_WEIGHTS = "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_{}.pth"

# A model's settings -> its number of parameters.
COUNTED = {}

by_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["Name"])


def test_the_index_lists_every_metafile():
    index = yaml.safe_load((PROJECT / "model-index.yml").read_text())["Import"]
    assert sorted(index) == [str(path.relative_to(PROJECT)) for path in METAFILES]
    assert all((path.parent / "README.md").is_file() for path in METAFILES)


def test_every_config_stands_in_one_metafile_and_every_entry_has_its_config():
    configs = [path for path in CONFIGS if not path.is_relative_to(SAMPLES)]
    assert len(configs) >= 90
    assert sorted(entry["Config"] for entry in ENTRIES) == sorted(
        str(path.relative_to(PROJECT)) for path in configs
    )


def count_parameters(cfg):
    """Of a config's model, which is built once for configs of other sizes and recipes."""
    settings = f"{cfg.default_scope} {cfg.model}"
    if settings not in COUNTED:
        COUNTED[settings] = sum(p.numel() for p in build_structure(cfg).parameters())
    return COUNTED[settings]


@by_entry
def test_an_entry_agrees_with_its_config(entry):
    about = entry["Metadata"]
    path = PROJECT / entry["Config"]
    cfg = load(path)
    assert path.stem == entry["Name"]
    assert entry["In Collection"] == COLLECTIONS[cfg.model.backbone.type]
    assert about.get("Epochs") == cfg.train_cfg.get("max_epochs")
    assert about.get("Iterations") == cfg.train_cfg.get("max_iters")
    assert about["Batch Size"] == cfg.auto_scale_lr.base_batch_size
    if cfg.model.backbone.type == "mmvmamba.VMamba" and isinstance(cfg.model.backbone.arch, str):
        assert cfg.model.backbone.arch in VMamba.arch_settings
    assert about["Parameters"] == count_parameters(cfg)


@by_entry
def test_an_entry_says_where_its_results_and_weights_come_from(entry):
    for result in entry.get("Results", ()):
        assert result["Source"].startswith(("arXiv 2401.10166v3, table ", "official repository"))
    assert entry.get("Weights", RELEASES[0]).startswith(RELEASES)
    if "FLOPs" in entry["Metadata"]:
        assert "FLOPs Input" in entry["Metadata"]


@by_entry
def test_a_name_tells_the_architecture(entry):
    backbone = load(PROJECT / entry["Config"]).model.backbone
    if isinstance(backbone.get("arch"), str) and "d-state" not in entry["Name"]:
        # The ablation of table 13 is named for what it is: s1l5, made from s2l5.
        arch = "tiny-s1l5" if backbone.get("ssm_ratio") == 1.0 else backbone.arch
        assert f"{entry['In Collection'].lower()}-{arch}" in entry["Name"]


@by_entry
def test_backbones_start_from_the_weights_of_their_architecture(entry):
    model = load(PROJECT / entry["Config"]).model
    backbone, family = model.backbone, entry["In Collection"]
    # Vim's fine-tuned classifiers start from a whole file.
    init_cfg = backbone.get("init_cfg") or (family == "Vim" and model.get("init_cfg"))
    if init_cfg:
        is_nat = family == "NAT"
        weights = (
            NAT_WEIGHTS.format(backbone.arch) if is_nat else WEIGHTS[family][key(backbone.arch)]
        )
        assert init_cfg == {"type": "Pretrained", "checkpoint": weights}


def test_classifiers_and_their_weights_fit():
    for entry in ENTRIES:
        cfg = load(PROJECT / entry["Config"])
        if cfg.default_scope == "mmpretrain" and "Weights" in entry:
            backbone = cfg.model.backbone
            arch = f"{backbone.arch}-stride8" if backbone.get("stride") == 8 else backbone.arch
            assert entry["Weights"] == WEIGHTS[entry["In Collection"]][key(arch)]
    for name, weights in WEIGHTS.items():
        (family,) = [path for path in METAFILES if path.parent.name == name.lower()]
        named = [entry.get("Weights") for entry in yaml.safe_load(family.read_text())["Models"]]
        assert sorted(filter(None, named)) == sorted(weights.values())


def key(arch):
    return arch.replace("-", "_")
