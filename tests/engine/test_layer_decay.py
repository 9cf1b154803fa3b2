"""Layer-wise decay of the learning rate: every parameter's rate and weight decay, exactly."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvmamba.models import VMamba


class Model(nn.Module):
    """A backbone of two stages, with one and two blocks, and a head."""

    def __init__(self, backbone=None):
        super().__init__()
        arch = {"dims": (16, 32), "depths": (1, 2), "d_state": 2, "mlp_ratio": 1.0}
        self.backbone = backbone or VMamba(arch)
        self.head = nn.Linear(32, 3)


def groups(model, **paramwise):
    wrapper = build_optim_wrapper(
        model,
        {
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.5},
            "constructor": "mmvmamba.LayerDecayOptimWrapperConstructor",
            "paramwise_cfg": paramwise,
        },
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[group["params"][0]]: group for group in wrapper.optimizer.param_groups}


# Distance from the head: 4 for the stem, then the three blocks, 0 for what follows the stages.
DISTANCES = {
    "backbone.patch_embed.": 4,
    "backbone.layers.0.blocks.0.": 3,
    "backbone.layers.0.downsample.": 3,
    "backbone.layers.1.blocks.0.": 2,
    "backbone.layers.1.blocks.1.": 1,
    "backbone.outnorm0.": 0,
    "backbone.outnorm1.": 0,
    "head.": 0,
}


def test_every_parameter_has_the_rate_of_its_depth():
    model = Model()
    found = groups(model, layer_decay_rate=0.5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, group in found.items():
        (distance,) = [d for prefix, d in DISTANCES.items() if name.startswith(prefix)]
        assert group["lr"] == 0.5**distance, name
        assert group["weight_decay"] == 0.5, name


def test_mengines_own_settings_still_count():
    found = groups(
        Model(),
        layer_decay_rate=0.5,
        norm_decay_mult=0.0,
        bias_decay_mult=0.1,
        custom_keys={"op.A_logs": {"decay_mult": 0.0}, "head": {"lr_mult": 10.0}},
    )
    first = "backbone.layers.0.blocks.0."
    assert found[f"{first}op.A_logs"]["weight_decay"] == 0.0
    assert found[f"{first}op.A_logs"]["lr"] == 0.5**3
    assert found[f"{first}norm.weight"]["weight_decay"] == 0.0
    assert found["backbone.patch_embed.2.weight"]["weight_decay"] == 0.0
    assert found[f"{first}mlp.fc1.bias"]["weight_decay"] == pytest.approx(0.05)
    assert found[f"{first}mlp.fc1.weight"]["weight_decay"] == 0.5
    assert found["head.weight"]["lr"] == 10.0


def test_frozen_parameters_are_left_out():
    model = Model(VMamba({"dims": (16, 32), "depths": (1, 1)}, frozen_stages=1))
    found = groups(model, layer_decay_rate=0.5)
    assert not any(name.startswith("backbone.patch_embed.") for name in found)
    assert found["backbone.layers.1.blocks.0.norm.weight"]["lr"] == 0.5


@pytest.mark.parametrize("rate", [None, 0.0, 1.5, "0.9"])
def test_a_wrong_rate_is_named(rate):
    with pytest.raises(ValueError, match="layer_decay_rate"):
        groups(Model(), layer_decay_rate=rate)


def test_a_backbone_without_depths_is_named():
    with pytest.raises(TypeError, match=r"Model has Identity"):
        groups(Model(nn.Identity()), layer_decay_rate=0.5)
