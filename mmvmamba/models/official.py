"""The official repository's modules, on ours: its constructors and parameter names, our operators.

A project that carries a copy of the official `vmamba.py` imports these in its place:

    from mmvmamba.models.official import SS2D, VSSBlock, VSSM, Backbone_VSSM

They take the official arguments, positions and defaults included, and load official checkpoints.
Each is the class of `mmvmamba.models` that it derives from, built from translated arguments.
Arguments without a counterpart here are refused by name.
"""

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT
from torch import Tensor, nn

from mmvmamba.models import layers, ss2d
from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.checkpoint import LoadReport, accept_conv_weights, current_names
from mmvmamba.models.layers import (
    LayerNorm,
    ToChannelsFirst,
    ToChannelsLast,
    build_norm,
    fx_leaf,
    trunc_normal_,
)
from mmvmamba.models.plans import Step, plan_of
from mmvmamba.models.ss2d import Mamba2Mixer, build_depthwise_conv
from mmvmamba.models.vmamba import VMamba, init_module
from mmvmamba.registry import MODELS
from mmvmamba_kernels import layer_norm

# What a forward type says about the architecture beside its gate. Those of a line are one function,
# in the official code at different speeds or in different precisions.
FORWARD_TYPES = {
    **{name: {} for name in ("v0", "v0seq")},
    **{name: {} for name in ("v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4")},
    **{name: {"scan": "unidi"} for name in ("v051d", "v31d")},
    **{name: {"scan": "bidi"} for name in ("v052d", "v32d")},
    "v052dc": {"scan": "cascade2d"},
    "m0": {"mixer": "mamba2"},
}
# What 'v0' and 'v0seq' fix, whatever the other arguments say.
VANILLA = {"gated": True, "act": "silu", "dwconv": True, "dwconv_bias": True, "init": "mamba"}
# What stands in the place of the output's normalisation, by the end of a forward type.
OUT_NORMS = ("none", "dwconv3", "cnorm", "softmax", "sigmoid")
# Older versions wrote the ends without an underscore.
END = re.compile(rf"_?(no32|noz|nozact|oact|on(?P<norm>{'|'.join(OUT_NORMS)}))$")
NO_COUNTERPART = {
    "nozact": "a gate without activation",
    "oact": "an activation behind the output's normalisation",
}
INITS = {"v0": "mamba", "v1": "rand", "v2": "zero"}
# 'ln' and 'ln2d' are one function in two memory layouts.
NORMS = {"ln": "ln", "ln2d": "ln", "bn": "bn"}
CHANNEL_FIRST = ("ln2d", "bn")
ACTIVATIONS = {nn.SiLU: "silu", nn.GELU: "gelu", nn.ReLU: "relu"}
# Arguments of OpenMMLab's Swin Transformer that `VSSM` has not. The official configs inherit them.
SWIN_ARGUMENTS = (
    *("pretrain_img_size", "embed_dims", "window_size", "num_heads", "strides", "qkv_bias"),
    *("qk_scale", "drop_rate", "attn_drop_rate", "use_abs_pos_embed", "act_cfg", "norm_cfg"),
    "convert_weights",
)


def _translate(argument: str, value: str, known: dict):
    key = value.lower()
    if key not in known:
        raise ArgumentError(f"{argument}={value!r} is unknown, choose from {', '.join(known)}.")
    return known[key]


def _expect(**arguments: tuple) -> None:
    """Refuses what has no counterpart here.

    Args:
        arguments: By name, the value given and the only one that is supported.
    """
    for name, (value, only) in arguments.items():
        if value != only:
            raise ArgumentError(f"{name}={value!r} is not supported, only {name}={only!r} is.")


def _refuse_unknown(owner: nn.Module, arguments: Iterable[str]) -> None:
    """Refuses arguments that the classes which hand on theirs do not have."""
    known = {name: None for cls in type(owner).__mro__ for name in _parameters(cls)}
    for name in arguments:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
        raise ArgumentError(f"{type(owner).__name__} has no argument {name!r}; {hint}")


def _parameters(cls: type) -> list[str]:
    if cls.__module__ != __name__ or "__init__" not in vars(cls):
        return []
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


def _check_rank_ratio(ssm_rank_ratio: float, ssm_ratio: float) -> None:
    if 0 < ssm_rank_ratio < ssm_ratio:
        raise ArgumentError(
            f"ssm_rank_ratio={ssm_rank_ratio!r} is not supported below ssm_ratio={ssm_ratio!r}: "
            "in the official code of February 2024 the scan then has fewer channels than the "
            "projection, with two more linear layers around it."
        )


def translate_forward_type(forward_type: str) -> tuple[dict, str | None]:
    """Translates an official `forward_type`, such as 'v05_noz', 'v3noz' or 'v05_onnone_noz'.

    Its ends, in any order: '_noz' (no gate), '_no32' (for the precision of a kernel, without effect
    here) and one of '_onnone', '_ondwconv3', '_oncnorm', '_onsoftmax' and '_onsigmoid' (what
    stands in the place of the output's normalisation).

    Returns:
        The attributes of `Arch` that it stands for, and what replaces the output's normalisation,
        one of `OUT_NORMS` or None.

    Raises:
        ArgumentError: If it is unknown or has no counterpart here.
    """
    base, ends, out_norm = forward_type, set(), None
    while found := END.search(base):
        ends.add(found[1])
        out_norm = found["norm"] or out_norm
        base = base[: found.start()]
    if base.startswith("xv"):
        raise ArgumentError(
            f"forward_type={forward_type!r} is not supported: the 'xv' types compute the time "
            "steps, B and C from the block's input, and SS2D computes them from what it scans."
        )
    if base == "v32dc":
        raise ArgumentError(
            f"forward_type={forward_type!r} does not run in the official code either; its working "
            "form is 'v052dc'."
        )
    if base not in FORWARD_TYPES:
        raise ArgumentError(
            f"forward_type={forward_type!r} is unknown, choose from {', '.join(FORWARD_TYPES)}, "
            "each but v0 and v0seq with or without '_noz' (no gate)."
        )
    for end in sorted(ends & NO_COUNTERPART.keys()):
        raise ArgumentError(
            f"forward_type={forward_type!r} is not supported: '_{end}' is {NO_COUNTERPART[end]}, "
            "which SS2D does not have."
        )
    if base in ("v0", "v0seq"):
        if ends:
            raise ArgumentError(
                f"forward_type={forward_type!r} does not exist: v0 always has its gate and its "
                "layer norm."
            )
        return VANILLA, None
    gated = "noz" not in ends
    if base == "m0" and gated:
        raise ArgumentError(
            f"forward_type={forward_type!r}: mixer='mamba2' has no gate, write 'm0_noz'."
        )
    return FORWARD_TYPES[base] | {"gated": gated}, out_norm


def _activation(layer: str | type[nn.Module]) -> str:
    if isinstance(layer, str):
        return layer.lower()
    if layer not in ACTIVATIONS:
        known = ", ".join(f"nn.{one.__name__}" for one in ACTIVATIONS)
        raise ArgumentError(f"activation {layer!r} is unknown, choose from {known}.")
    return ACTIVATIONS[layer]


def translate_mixer(
    d_state: int,
    ssm_ratio: float,
    dt_rank: int | Literal["auto"],
    act_layer: str | type[nn.Module],
    d_conv: int,
    conv_bias: bool,
    dropout: float,
    initialize: str,
    forward_type: str,
) -> tuple[dict, str | None]:
    """Translates the arguments of the official SS2D.

    Returns:
        As `translate_forward_type`, with all attributes of `Arch` that are the mixer's.

    Raises:
        ArgumentError: If one is unknown or has no counterpart here.
    """
    if d_conv != 3 and d_conv > 1:
        raise ArgumentError(
            f"ssm_conv={d_conv!r} is not supported: give 3, or a number below 2 for no convolution."
        )
    type_fields, out_norm = translate_forward_type(forward_type)
    fields = {
        "d_state": d_state,
        "ssm_ratio": ssm_ratio,
        "dt_rank": dt_rank,
        "dwconv": d_conv > 1,
        "dwconv_bias": conv_bias,
        "act": _activation(act_layer),
        "init": _translate("ssm_init", initialize, INITS),
        "ssm_drop": dropout,
    }
    return fields | type_fields, out_norm


def set_out_norm(op: nn.Module, out_norm: str | None) -> None:
    """Replaces the normalisation of a mixer's output by one of `OUT_NORMS`; None leaves it.

    The modules' places in sequences are the official parameter names.
    """
    norm = op.out_norm
    if out_norm is None:
        return
    conv = [ToChannelsFirst(), build_depthwise_conv(norm.weight.numel(), False), ToChannelsLast()]
    op.out_norm = {
        "none": nn.Identity(),
        "dwconv3": nn.Sequential(*conv),
        "cnorm": nn.Sequential(norm, *conv),
        "softmax": SoftmaxSpatial(),
        "sigmoid": nn.Sigmoid(),
    }[out_norm]


class SoftmaxSpatial(nn.Module):
    """Softmax over the positions of (B, H, W, C), for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


class LayerNorm2d(LayerNorm):
    """Layer normalisation of the channels of NCHW."""

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = layer_norm(x, self.weight, self.bias, eps=self.eps, out_dtype=self.out_dtype(x))
        return y.permute(0, 3, 1, 2)


class Linear2d(nn.Linear):
    """A linear layer on the channels of NCHW, which takes weights of 1x1 convolutions too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(accept_conv_weights, with_module=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Permute(nn.Module):
    """`x.permute(*args)`."""

    def __init__(self, *args: int):
        super().__init__()
        self.args = args

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.args)


class SS2D(ss2d.SS2D):
    """`mmvmamba.models.ss2d.SS2D` under the official arguments.

    Args:
        d_model: Channels C of the map.
        d_state: State size N of each channel.
        ssm_ratio: Channels inside over C; `expand` is its first name.
        dt_rank: Rank of the time step's projection; 'auto' is ceil(C / 16).
        act_layer: nn.SiLU, nn.GELU or nn.ReLU, or their names.
        d_conv: 3, or less than 2 for no depth-wise convolution.
        conv_bias: Whether that convolution has a bias.
        dropout: Dropout rate of the output.
        bias: Only False.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: Only the defaults.
        initialize: 'v0' (as Mamba), 'v1' (random) or 'v2' (zero).
        forward_type: See `translate_forward_type`. Not 'm0', which is `SS2Dm0`.
        channel_first: Whether maps are (B, C, H, W) and not (B, H, W, C).
        ssm_rank_ratio: Not used; at least `ssm_ratio`, or not positive.

    Raises:
        ArgumentError: On a value or an argument that is unknown or has no counterpart here.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: str | type[nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        initialize: str = "v0",
        forward_type: str = "v2",
        channel_first: bool = False,
        *,
        ssm_rank_ratio: float = -1.0,
        **others,
    ):
        ssm_ratio = others.pop("expand", ssm_ratio)
        _check_rank_ratio(ssm_rank_ratio, ssm_ratio)
        _expect(
            bias=(bias, False),
            dt_min=(dt_min, 0.001),
            dt_max=(dt_max, 0.1),
            dt_init=(dt_init, "random"),
            dt_scale=(dt_scale, 1.0),
            dt_init_floor=(dt_init_floor, 1e-4),
            # Of the first version.
            device=(others.pop("device", None), None),
            dtype=(others.pop("dtype", None), None),
        )
        _refuse_unknown(self, others)
        mixer, out_norm = translate_mixer(
            *(d_state, ssm_ratio, dt_rank, act_layer, d_conv, conv_bias, dropout, initialize),
            forward_type,
        )
        if "mixer" in mixer:
            raise ArgumentError(
                f"forward_type={forward_type!r} belongs to SS2Dm0: build SS2Dm0 instead of SS2D."
            )
        super().__init__(
            d_model,
            d_state,
            ssm_ratio,
            dt_rank,
            scan=mixer.get("scan", "cross2d"),
            drop=dropout,
            **{name: mixer[name] for name in ("gated", "dwconv", "dwconv_bias", "act", "init")},
        )
        self.channel_first = channel_first
        set_out_norm(self, out_norm)
        self._register_load_state_dict_pre_hook(accept_conv_weights, with_module=True)

    @fx_leaf
    def forward(self, x: Tensor, **_) -> Tensor:
        """Mixes a map, (B, H, W, C) or for `channel_first` (B, C, H, W), to the same shape."""
        if not self.channel_first:
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @plan_of(forward)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """What `forward` does with maps (B, H, W, C) of a shape, see `plans`."""
        return None if self.channel_first else super().plan(shape)


class SS2Dm0(Mamba2Mixer):
    """`mmvmamba.models.ss2d.Mamba2Mixer` under `SS2D`'s arguments, for forward type 'm0_noz'.

    Raises:
        ArgumentError: On a value that is unknown or has no counterpart here.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: str | type[nn.Module] = nn.GELU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        initialize: str = "v2",
        forward_type: str = "m0_noz",
        channel_first: bool = False,
    ):
        _expect(channel_first=(channel_first, False))
        mixer, out_norm = translate_mixer(
            *(d_state, ssm_ratio, dt_rank, act_layer, d_conv, conv_bias, dropout, initialize),
            forward_type,
        )
        super().__init__(
            d_model,
            d_state,
            ssm_ratio,
            dt_rank,
            drop=dropout,
            **{name: mixer[name] for name in ("dwconv", "dwconv_bias", "act", "init")},
        )
        set_out_norm(self, out_norm)


class VSSBlock(layers.VSSBlock):
    """`mmvmamba.models.layers.VSSBlock` under the official arguments.

    Args:
        hidden_dim: Channels C of the map.
        drop_path: Rate at which a sample skips a branch in training.
        norm_layer: Makes a normalisation of C channels: nn.LayerNorm, nn.BatchNorm2d, or what
            derives from them, with any `eps`.
        channel_first: Whether maps are (B, C, H, W) and not (B, H, W, C).
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate,
            ssm_init, forward_type, ssm_rank_ratio: As `SS2D`'s; 'm0_noz' is a forward type too.
        mlp_ratio: Hidden channels of the MLP over C; 0 for none.
        mlp_act_layer: Activation of the MLP.
        mlp_drop_rate: Dropout rate in the MLP.
        gmlp: Only False.
        use_checkpoint: Whether to use gradient checkpointing.
        post_norm: Only False.
        _SS2D: Makes the mixer from `SS2D`'s arguments. Its maps are (B, H, W, C) in any case.

    Raises:
        ArgumentError: On a value or an argument that is unknown or has no counterpart here.
    """

    def __init__(
        self,
        hidden_dim: int = 0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        channel_first: bool = False,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_act_layer: str | type[nn.Module] = nn.SiLU,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str | type[nn.Module] = nn.GELU,
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        use_checkpoint: bool = False,
        post_norm: bool = False,
        _SS2D: Callable[..., nn.Module] = SS2D,
        *,
        ssm_rank_ratio: float = -1.0,
        **others,
    ):
        _check_rank_ratio(ssm_rank_ratio, ssm_ratio)
        _expect(gmlp=(gmlp, False), post_norm=(post_norm, False))
        _refuse_unknown(self, others)
        make = SS2Dm0 if _SS2D is SS2D and forward_type.startswith("m") else _SS2D
        op = make(
            d_model=hidden_dim,
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            act_layer=ssm_act_layer,
            d_conv=ssm_conv,
            conv_bias=ssm_conv_bias,
            dropout=ssm_drop_rate,
            initialize=ssm_init,
            forward_type=forward_type,
            channel_first=False,
        )
        norm, eps = _norm_and_eps(norm_layer, hidden_dim)
        super().__init__(
            hidden_dim,
            op,
            norm,
            mlp_ratio,
            _activation(mlp_act_layer),
            mlp_drop=mlp_drop_rate,
            drop_path=drop_path,
            with_cp=use_checkpoint,
        )
        self.channel_first = channel_first
        for name in ("norm", "norm2"):
            if hasattr(self, name):
                getattr(self, name).eps = eps
        self._register_load_state_dict_pre_hook(accept_conv_weights, with_module=True)

    plan = layers.VSSBlock.plan


def _norm_and_eps(norm_layer: Callable[[int], nn.Module], channels: int) -> tuple[str, float]:
    norm = norm_layer(channels)
    for kind, name in ((nn.LayerNorm, "ln"), (nn.BatchNorm2d, "bn")):
        if not isinstance(norm, kind):
            continue
        plain = kind(channels)
        same = norm.state_dict().keys() == plain.state_dict().keys()
        if not same or getattr(norm, "momentum", None) != getattr(plain, "momentum", None):
            raise ArgumentError(
                f"norm_layer={norm_layer!r} makes {norm!r}: of its settings only eps is supported."
            )
        return name, norm.eps
    raise ArgumentError(
        f"norm_layer={norm_layer!r} makes a {type(norm).__name__}, expected nn.LayerNorm, "
        "nn.BatchNorm2d or what derives from them."
    )


class VSSM(VMamba):
    """The official classifier; a `VMamba` under the official arguments, with a head.

    A subclass may lay out its forward pass itself, as with the official class: `patch_embed`,
    `layers`, whose `blocks` and `downsample` follow each other, and `classifier` can be called one
    by one. Between them maps are (B, C, H, W) for `channel_first`, else (B, H, W, C).

    Args:
        patch_size: Stride of the stem; only 4.
        in_chans: Channels of the image.
        num_classes: Classes; without effect in `Backbone_VSSM`.
        depths: Blocks per stage.
        dims: Channels of the first stage, or of each.
        ssm_d_state: State size.
        ssm_ratio: Channels inside SS2D over the stage's.
        ssm_dt_rank: 'auto' or the rank of the time step's projection.
        ssm_act_layer: 'silu', 'gelu' or 'relu'.
        ssm_conv: 3, or less than 2 for no depth-wise convolution.
        ssm_conv_bias: Whether that convolution has a bias.
        ssm_drop_rate: Dropout rate after SS2D.
        ssm_init: 'v0' (as Mamba), 'v1' (random) or 'v2' (zero).
        forward_type: See `translate_forward_type`. 'v0' and 'v0seq' fix `ssm_act_layer`,
            `ssm_conv`, `ssm_conv_bias` and `ssm_init`, as in the official code.
        mlp_ratio: Hidden channels of the MLP over the stage's; 0 for none.
        mlp_act_layer: Activation of the MLP.
        mlp_drop_rate: Dropout rate in the MLP.
        gmlp: Only False.
        drop_path_rate: Stochastic depth's largest rate.
        patch_norm: Only True.
        norm_layer: 'ln', 'ln2d' (the same function, for `channel_first`) or 'bn'.
        downsample_version: 'v1', 'v2' or 'v3'.
        patchembed_version: 'v1' or 'v2'.
        use_checkpoint: Whether to use gradient checkpointing; `with_cp` is the same.
        posembed: Whether a position embedding is added to the stem's map. `Backbone_VSSM` has it,
            and does not add it: as the official backbone, which never did.
        imgsize: Side of the images that the position embedding is for. For maps of other sizes, and
            from files with others, it is interpolated.
        _SS2D: Makes the mixers from `SS2D`'s arguments, for maps (B, H, W, C).
        ssm_rank_ratio: Not used; at least `ssm_ratio`, or not positive.
        channel_first: Not used: `norm_layer` says it.
        out_indices: Stages whose maps are returned, for `Backbone_VSSM`.
        pretrained: A checkpoint that is loaded, strictly, at construction; None and '' mean none.
        frozen_stages, norm_eval, with_cp, init_cfg: As `VMamba`'s.
        **others: What configs have that inherit a Swin Transformer: its arguments are named in a
            warning and dropped, and with them `init_cfg`, which is of its weights.

    Raises:
        ArgumentError: On a value or an argument that is unknown or has no counterpart here.
        CheckpointError: If `pretrained` cannot be loaded completely.
    """

    has_classifier = True

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "LN",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int = 224,
        _SS2D: Callable[..., nn.Module] = SS2D,
        *,
        ssm_rank_ratio: float = -1.0,
        channel_first: bool | None = None,  # noqa: ARG002
        out_indices: Sequence[int] = (-1,),
        pretrained: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **others,
    ):
        _refuse_unknown(self, [name for name in others if name not in SWIN_ARGUMENTS])
        if others:
            _warn_of_leftovers(self, sorted(others), init_cfg)
            init_cfg = None
        _check_rank_ratio(ssm_rank_ratio, ssm_ratio)
        _expect(patch_size=(patch_size, 4), gmlp=(gmlp, False), patch_norm=(patch_norm, True))
        mixer_arguments = {
            "d_state": ssm_d_state,
            "ssm_ratio": ssm_ratio,
            "dt_rank": ssm_dt_rank,
            "act_layer": ssm_act_layer,
            "d_conv": ssm_conv,
            "conv_bias": ssm_conv_bias,
            "dropout": ssm_drop_rate,
            "initialize": ssm_init,
            "forward_type": forward_type,
        }
        mixer, out_norm = translate_mixer(**mixer_arguments)
        arch = {
            "dims": dims,
            "depths": depths,
            "mlp_ratio": mlp_ratio,
            "mlp_act": _activation(mlp_act_layer),
            "mlp_drop": mlp_drop_rate,
            "norm": _translate("norm_layer", norm_layer, NORMS),
            "stem": patchembed_version,
            "downsample": downsample_version,
            "drop_path_rate": drop_path_rate,
            **mixer,
        }
        super().__init__(
            arch,
            in_channels=in_chans,
            out_indices=out_indices,
            outnorm=not self.has_classifier,
            pretrained=pretrained,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=use_checkpoint or with_cp,
            init_cfg=init_cfg,
        )
        self.dims = list(self.arch.dims)
        self.num_layers = len(self.dims)
        self.channel_first = norm_layer.lower() in CHANNEL_FIRST
        # A mixer of the project's own gets a class, as from the official code.
        classes = {name: layer for layer, name in ACTIVATIONS.items()}
        mixer_arguments["act_layer"] = classes[self.arch.act]
        for dim, layer in zip(self.dims, self.layers, strict=True):
            for block in layer.blocks:
                block.channel_first = self.channel_first
                if _SS2D is SS2D:
                    set_out_norm(block.op, out_norm)
                else:
                    block.op = _SS2D(d_model=dim, channel_first=False, **mixer_arguments)
                    block.op.apply(init_module)
        if self.channel_first:
            self.patch_embed.append(ToChannelsFirst())
            for layer in self.layers[:-1]:
                layer.downsample.register_forward_pre_hook(_to_channels_last)
                layer.downsample.register_forward_hook(_to_channels_first)
        self.layers[-1].downsample = nn.Identity()
        self.pos_embed = None
        if posembed:
            side = imgsize // patch_size
            embedding = torch.zeros(1, self.dims[0], side, side)
            self.pos_embed = nn.Parameter(embedding, requires_grad=self.has_classifier)
            trunc_normal_(self.pos_embed, std=0.02)
        if self.has_classifier:
            self.num_classes = num_classes
            self.classifier = self._build_classifier(num_classes)
        self._freeze_stages()
        self._register_load_state_dict_pre_hook(self._accept_official_files)
        if pretrained:
            self.load_pretrained(pretrained)

    def _build_classifier(self, num_classes: int) -> nn.Sequential:
        norms = {"ln": LayerNorm2d, "bn": nn.BatchNorm2d}
        classifier = nn.Sequential()
        classifier.norm = (
            norms[self.arch.norm](self.dims[-1])
            if self.channel_first
            else build_norm(self.arch.norm, self.dims[-1])
        )
        classifier.permute = nn.Identity() if self.channel_first else ToChannelsFirst()
        classifier.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier.flatten = nn.Flatten(1)
        classifier.head = nn.Linear(self.dims[-1], num_classes)
        return classifier.apply(init_module)

    def _embed(self, x: Tensor) -> Tensor:
        x = super()._embed(x)
        if self.pos_embed is None or not self.has_classifier:
            return x
        size = x.shape[-2:] if self.channel_first else x.shape[1:3]
        embedding = _interpolated(self.pos_embed, size).to(x.dtype)
        return x + (embedding if self.channel_first else embedding.permute(0, 2, 3, 1))

    def _output(self, stage: int, x: Tensor) -> Tensor:
        return super()._output(stage, x.permute(0, 2, 3, 1) if self.channel_first else x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Classifies images.

        Args:
            x: As `VMamba.forward`'s.

        Returns:
            Scores, (B, num_classes). `Backbone_VSSM` returns maps, as `VMamba.forward`.
        """
        maps = super().forward(x)
        if not self.has_classifier:
            return maps
        return self.classifier(maps[-1] if self.channel_first else maps[-1].permute(0, 2, 3, 1))

    def load_pretrained(
        self, ckpt: str | None = None, key: str | None = None, **others
    ) -> LoadReport | None:
        """Loads weights, as `VMamba.load_pretrained`, but strictly, unlike the official code.

        Args:
            ckpt: The file; nothing is loaded without one.
            key: The file's entry, 'model' or 'model_ema' for instance; see `load_backbone`.
            **others: Further arguments of `VMamba.load_pretrained`.
        """
        return super().load_pretrained(ckpt, **{"entry": key} | others) if ckpt else None

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        # The parent's constructor calls this, too.
        if self.frozen_stages >= 0 and getattr(self, "pos_embed", None) is not None:
            self.pos_embed.requires_grad_(False)

    def _accept_official_files(self, state_dict, prefix, *_) -> None:
        """Gives keys of older files their names of today, and position embeddings their size."""
        own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        for key, name in current_names(own).items():
            if name != key:
                state_dict[prefix + name] = state_dict.pop(prefix + key)
        embedding = state_dict.get(f"{prefix}pos_embed")
        if embedding is not None and self.pos_embed is not None:
            size = self.pos_embed.shape[-2:]
            state_dict[f"{prefix}pos_embed"] = _interpolated(embedding, size)


def _warn_of_leftovers(model: nn.Module, names: list[str], init_cfg: object) -> None:
    dropped = ", ".join(names)
    if init_cfg:
        dropped += f" and with them init_cfg={init_cfg!r}"
    print_log(
        f"{type(model).__name__} drops what the config has from a Swin Transformer: {dropped}. "
        "Say _delete_=True in the backbone, and these are not inherited; weights of this backbone "
        "go to `pretrained`.",
        logger="current",
        level=logging.WARNING,
    )


def _interpolated(embedding: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(embedding.shape[-2:]) == tuple(size):
        return embedding
    return F.interpolate(embedding.float(), size=tuple(size), mode="bicubic", align_corners=False)


def _to_channels_last(_, arguments: tuple[Tensor]) -> Tensor:
    return arguments[0].permute(0, 2, 3, 1)


def _to_channels_first(_, __, output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


class Backbone_VSSM(VSSM):  # noqa: N801 (the official class name)
    """The official backbone: `VSSM` without its classifier, with a normalisation per map.

    Args:
        out_indices: Stages whose maps are returned.
        pretrained: As `VSSM`'s.
        norm_layer: As `VSSM`'s.
        **others: Further arguments of `VSSM`.
    """

    has_classifier = False

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        norm_layer: str = "ln",
        **others,
    ):
        super().__init__(
            out_indices=out_indices, pretrained=pretrained, norm_layer=norm_layer, **others
        )


@MODELS.register_module()
class MM_VSSM(Backbone_VSSM):  # noqa: N801 (the official class name)
    """`Backbone_VSSM` under the name that official detection and segmentation configs have."""


def offer_official_name() -> None:
    """Lets configs of all scopes say `type='MM_VSSM'`.

    To be called after what a config imports: a project that registers the name itself, in any
    registry, keeps it.
    """
    if MM_VSSM.__name__ not in ROOT.module_dict:
        ROOT.register_module(module=MM_VSSM)
