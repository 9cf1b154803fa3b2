"""`MM_VSSM`: the official repository's backbone under its own keyword arguments."""

from collections.abc import Sequence
from typing import Literal

from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.vmamba import VMamba
from mmvmamba.registry import MODELS

# What a forward type says about the architecture beside its gate. v01 to v05 are one function at
# different speeds in the official code.
FORWARD_TYPES = {
    "v0": {},
    **{f"v0{i}": {} for i in range(1, 6)},
    "v051d": {"scan": "unidi"},
    "v052d": {"scan": "bidi"},
    "v052dc": {"scan": "cascade2d"},
    "m0": {"mixer": "mamba2"},
}
INITS = {"v0": "mamba", "v1": "rand", "v2": "zero"}
# 'ln' and 'ln2d' are one function in two memory layouts.
NORMS = {"ln": "ln", "ln2d": "ln", "bn": "bn"}


def _translate(argument: str, value: str, known: dict):
    key = value.lower()
    if key not in known:
        raise ArgumentError(f"{argument}={value!r} is unknown, choose from {', '.join(known)}.")
    return known[key]


def translate_forward_type(forward_type: str) -> dict:
    """Translates an official `forward_type`, such as 'v05_noz'.

    Returns:
        The attributes of `Arch` that it stands for.

    Raises:
        ArgumentError: If it is unknown; the message lists the known ones.
    """
    base = forward_type.removesuffix("_noz")
    if base not in FORWARD_TYPES:
        raise ArgumentError(
            f"forward_type={forward_type!r} is unknown, choose from {', '.join(FORWARD_TYPES)}, "
            "each but v0 with or without '_noz' (no gate)."
        )
    if forward_type == "v0_noz":
        raise ArgumentError("forward_type='v0_noz' does not exist: v0 always has its gate.")
    return FORWARD_TYPES[base] | {"gated": base == forward_type}


@MODELS.register_module()
class MM_VSSM(VMamba):  # noqa: N801 (the official class name)
    """VMamba built from the official repository's keyword arguments, with its defaults.

    Args:
        out_indices: Stages whose maps are returned.
        pretrained: A checkpoint that is loaded, strictly, at construction; None and '' mean none.
        patch_size: Stride of the stem; only 4.
        in_chans: Channels of the image.
        num_classes: The official classifier's; a backbone has none, the value is not used.
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
        forward_type: See `translate_forward_type`.
        mlp_ratio: Hidden channels of the MLP over the stage's; 0 for none.
        mlp_act_layer: Activation of the MLP.
        mlp_drop_rate: Dropout rate in the MLP.
        gmlp: Only False.
        drop_path_rate: Stochastic depth's largest rate.
        patch_norm: Only True.
        norm_layer: 'ln', 'ln2d' (the same function) or 'bn'.
        downsample_version: 'v1', 'v2' or 'v3'.
        patchembed_version: 'v1' or 'v2'.
        use_checkpoint: Whether to use gradient checkpointing.
        posembed: Only False.
        imgsize: Not used without a position embedding.
        frozen_stages: As `VMamba`'s.
        init_cfg: As `VMamba`'s.

    Raises:
        ArgumentError: On a value that is unknown or has no counterpart here.
        CheckpointError: If `pretrained` cannot be loaded completely.
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,  # noqa: ARG002 (part of the official signature)
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
        forward_type: str = "v05",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "ln",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int = 224,  # noqa: ARG002
        frozen_stages: int = -1,
        init_cfg: dict | list[dict] | None = None,
    ):
        for name, value, only in (
            ("patch_size", patch_size, 4),
            ("gmlp", gmlp, False),
            ("patch_norm", patch_norm, True),
            ("posembed", posembed, False),
        ):
            if value != only:
                raise ArgumentError(f"{name}={value!r} is not supported, only {name}={only!r} is.")
        if ssm_conv != 3 and ssm_conv > 1:
            raise ArgumentError(
                f"ssm_conv={ssm_conv!r} is not supported: 3, or less than 2 for no convolution."
            )
        arch = {
            "dims": dims,
            "depths": depths,
            "d_state": ssm_d_state,
            "ssm_ratio": ssm_ratio,
            "dt_rank": ssm_dt_rank,
            "dwconv": ssm_conv > 1,
            "dwconv_bias": ssm_conv_bias,
            "act": ssm_act_layer.lower(),
            "init": _translate("ssm_init", ssm_init, INITS),
            "ssm_drop": ssm_drop_rate,
            "mlp_ratio": mlp_ratio,
            "mlp_act": mlp_act_layer.lower(),
            "mlp_drop": mlp_drop_rate,
            "norm": _translate("norm_layer", norm_layer, NORMS),
            "stem": patchembed_version,
            "downsample": downsample_version,
            "drop_path_rate": drop_path_rate,
            **translate_forward_type(forward_type),
        }
        super().__init__(
            arch,
            in_channels=in_chans,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=use_checkpoint,
            init_cfg=init_cfg,
        )
        self.pretrained = pretrained
        if pretrained:
            self.load_pretrained(pretrained)

    def init_weights(self) -> None:
        """Initialises as `init_cfg` says; `pretrained` outlasts an initialisation by the parent."""
        super().init_weights()
        if self.pretrained:
            self.load_pretrained(self.pretrained)
