"""The VMamba backbone ("VMamba: Visual State Space Model", arXiv 2401.10166v3)."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx, nn
from torch._inductor import list_mode_options
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.models.arguments import ArgumentError, check_choice
from mmvmamba.models.backbone import Backbone
from mmvmamba.models.checkpoint import accept_conv_weights
from mmvmamba.models.layers import (
    ACTIVATIONS,
    NORMS,
    ActivationName,
    NormName,
    VSSBlock,
    build_downsample,
    build_norm,
    build_stem,
    normalize,
    trunc_normal_,
)
from mmvmamba.models.precompile import prepare
from mmvmamba.models.ss2d import INITS, SS2D, InitName, Mamba2Mixer, ScanName, find_scan
from mmvmamba.registry import MODELS

COMPILE_OPTIONS = {"layout_optimization": False}
"""Options of `torch.compile` for models that hold a VMamba.

Inductor's layout pass takes each 4-D tensor on the way from or to a convolution for NCHW. Most here
are (B, H, W, C), in the best order already: it would lay them out with the height innermost and, in
training, compile anew for every size of images.
"""


@dataclass(frozen=True)
class Arch:
    """An architecture, checked at construction.

    Attributes:
        dims: Channels of the first stage, doubled from stage to stage, or one number per stage.
        depths: Blocks per stage.
        d_state: State size N of each channel.
        ssm_ratio: Channels inside the mixer over the stage's.
        dt_rank: Rank of the time step's projection (heads of the Mamba-2 mixer); 'auto' is
            ceil(dim / 16).
        mixer: 'ss2d' or 'mamba2'.
        scan: 'cross2d', 'unidi', 'bidi' or 'cascade2d' (paper, table 10); by lists of positions
            'snake', 'diagonal', 'hilbert', 'window7', 'atrous2' (or another number); or a function
            of height and width. See `find_scan` and docs/scan_paths.md.
        gated: Whether SS2D has the multiplicative branch.
        dwconv: Whether SS2D has its depth-wise convolution.
        dwconv_bias: Whether that convolution has a bias.
        act: Activation in the mixer: 'silu', 'gelu' or 'relu' (paper, table 15).
        init: 'mamba', 'rand' or 'zero' (paper, table 11).
        ssm_drop: Dropout rate after the mixer.
        mlp_ratio: Hidden channels of the MLP over the stage's; 0 for no MLP.
        mlp_act: Activation of the MLP.
        mlp_drop: Dropout rate in the MLP.
        norm: 'ln' or 'bn'.
        stem: 'v1' (one 4x4 convolution) or 'v2' (two 3x3 convolutions).
        downsample: 'v1' (patch merging), 'v2' (2x2 convolution) or 'v3' (3x3 convolution).
        drop_path_rate: Stochastic depth's largest rate, reached in the last block.
    """

    dims: int | Sequence[int]
    depths: Sequence[int]
    d_state: int = 1
    ssm_ratio: float = 1.0
    dt_rank: int | Literal["auto"] = "auto"
    mixer: Literal["ss2d", "mamba2"] = "ss2d"
    scan: ScanName = "cross2d"
    gated: bool = False
    dwconv: bool = True
    dwconv_bias: bool = False
    act: ActivationName = "silu"
    init: InitName = "mamba"
    ssm_drop: float = 0.0
    mlp_ratio: float = 4.0
    mlp_act: ActivationName = "gelu"
    mlp_drop: float = 0.0
    norm: NormName = "ln"
    stem: Literal["v1", "v2"] = "v2"
    downsample: Literal["v1", "v2", "v3"] = "v3"
    drop_path_rate: float = 0.2

    def __post_init__(self):
        _check_positive_integers("depths", self.depths)
        if isinstance(self.dims, int):
            object.__setattr__(self, "dims", [self.dims * 2**i for i in range(len(self.depths))])
        _check_positive_integers("dims", self.dims)
        if len(self.dims) != len(self.depths):
            raise ArgumentError(
                f"dims has {len(self.dims)} stages and depths has {len(self.depths)}: "
                f"{self.dims!r}, {self.depths!r}. Give one number of each per stage."
            )
        for name, valid in (
            ("mixer", ("ss2d", "mamba2")),
            ("act", tuple(ACTIVATIONS)),
            ("init", INITS),
            ("mlp_act", tuple(ACTIVATIONS)),
            ("norm", NORMS),
            ("stem", ("v1", "v2")),
            ("downsample", ("v1", "v2", "v3")),
        ):
            check_choice(name, getattr(self, name), valid)
        object.__setattr__(self, "scan", find_scan(self.scan))
        for name in ("ssm_drop", "mlp_drop", "drop_path_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ArgumentError(f"{name}={value!r} must be a rate in [0, 1).")
        for name in ("gated", "dwconv", "dwconv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not isinstance(self.d_state, int) or self.d_state < 1:
            raise ArgumentError(f"d_state={self.d_state!r} must be an integer of at least 1.")
        if not _is_number(self.ssm_ratio) or int(self.ssm_ratio * min(self.dims)) < 1:
            raise ArgumentError(
                f"ssm_ratio={self.ssm_ratio!r} must be a number that leaves at least one channel."
            )
        if not _is_number(self.mlp_ratio) or self.mlp_ratio < 0:
            raise ArgumentError(f"mlp_ratio={self.mlp_ratio!r} must be a number of at least 0.")
        if self.dt_rank != "auto" and (not isinstance(self.dt_rank, int) or self.dt_rank < 1):
            raise ArgumentError(f"dt_rank={self.dt_rank!r} must be 'auto' or a positive integer.")
        if self.mixer == "mamba2" and (self.gated or self.scan != "cross2d"):
            raise ArgumentError(
                "mixer='mamba2' has no gate and only scans 'cross2d': set gated=False and "
                "scan='cross2d'."
            )
        if self.stem == "v2" and self.dims[0] % 2:
            raise ArgumentError(
                f"stem='v2' needs an even number of channels, dims[0]={self.dims[0]}."
            )

    def rank(self, stage: int) -> int:
        """The time step's rank (or number of heads) in a stage."""
        return math.ceil(self.dims[stage] / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def min_size(self) -> int:
        """The smallest image side, in pixels, that every stage can take."""
        stem = 4 if self.stem == "v1" else 1
        # A 2x2 convolution without padding needs two positions; the others round up.
        return 4 * 2 ** (len(self.dims) - 1) if self.downsample == "v2" else stem


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_positive_integers(name: str, values) -> None:
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence)
        or not values
        or not all(isinstance(v, int) and v > 0 for v in values)
    ):
        raise ArgumentError(f"{name}={values!r} must be positive integers, one per stage.")


def _vanilla(dims: int, depth: int, drop_path_rate: float) -> Arch:
    return Arch(
        dims=dims,
        depths=(2, 2, depth, 2),
        d_state=16,
        ssm_ratio=2.0,
        gated=True,
        dwconv_bias=True,
        mlp_ratio=0.0,
        stem="v1",
        downsample="v1",
        drop_path_rate=drop_path_rate,
    )


def _vmamba(dims: int, ssm_ratio: float, depth: int, drop_path_rate: float) -> Arch:
    return Arch(
        dims=dims, depths=(2, 2, depth, 2), ssm_ratio=ssm_ratio, drop_path_rate=drop_path_rate
    )


def _mamba2(dims: int, depth: int, drop_path_rate: float) -> Arch:
    return Arch(
        dims=dims,
        depths=(2, 2, depth, 2),
        d_state=64,
        mixer="mamba2",
        act="gelu",
        init="zero",
        drop_path_rate=drop_path_rate,
    )


@MODELS.register_module()
class VMamba(Backbone):
    """VMamba, a backbone of linear complexity in the number of positions.

    Parameter names are the official repository's. Maps are channels-last inside; what goes in and
    comes out is NCHW.

    Args:
        arch: A name of `arch_settings`, or a dict of `Arch`'s attributes. 'tiny', 'small' and
            'base' are the paper's VMamba-T, -S and -B.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, all by default; negative numbers count from
            the last. Those after the last one named are neither computed nor trained.
        outnorm: Whether each returned map passes a normalisation of its own (`outnorm{i}`).
            Classifiers say False, since `VMambaClsHead` normalises.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages.
        with_cp: Whether to recompute blocks in the backward pass (gradient checkpointing).
        init_cfg: mmengine's initialisation. `dict(type='Pretrained', checkpoint=...)` takes
            official files and mmengine checkpoints, and is strict: see `load_backbone`, whose
            `prefix`, `in_channels` and `entry` may stand beside `checkpoint`.
        pretrained: A checkpoint, short for that `init_cfg`, as mmseg's backbones have it.
        norm_eval: Whether batch norms keep to evaluation in training.
        drop_path_rate, d_state, ssm_ratio, dt_rank, scan, gated, dwconv, dwconv_bias, act, init,
            mlp_ratio, norm: Where given, these take the place of the arch's own; see `Arch`.

    Raises:
        ArgumentError: On an unknown arch or a wrong value; the message lists what is valid.
        TypeError: On an unknown argument.

    Examples:
        >>> model = VMamba("tiny-s1l8")
        >>> [tuple(x.shape) for x in model(torch.zeros(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    arch_settings = {  # noqa: RUF012 (OpenMMLab's name for a class-level table)
        "vanilla-tiny": _vanilla(96, 9, 0.2),
        "vanilla-small": _vanilla(96, 27, 0.3),
        "vanilla-base": _vanilla(128, 27, 0.6),
        "tiny-s2l5": _vmamba(96, 2.0, 5, 0.2),
        "tiny-s1l8": _vmamba(96, 1.0, 8, 0.2),
        "small-s2l15": _vmamba(96, 2.0, 15, 0.3),
        "small-s1l20": _vmamba(96, 1.0, 20, 0.3),
        "base-s2l15": _vmamba(128, 2.0, 15, 0.6),
        "base-s1l20": _vmamba(128, 1.0, 20, 0.5),
        "tiny-m2": _mamba2(96, 4, 0.2),
        "small-m2": _mamba2(96, 12, 0.3),
        "base-m2": _mamba2(128, 12, 0.3),
    }
    arch_aliases = {"tiny": "tiny-s1l8", "small": "small-s2l15", "base": "base-s2l15"}  # noqa: RUF012
    foreign_parts = ("classifier.", "outnorm")
    own_parts = ("outnorm",)

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        outnorm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        drop_path_rate: float | None = None,
        d_state: int | None = None,
        ssm_ratio: float | None = None,
        dt_rank: int | Literal["auto"] | None = None,
        scan: ScanName | None = None,
        gated: bool | None = None,
        dwconv: bool | None = None,
        dwconv_bias: bool | None = None,
        act: ActivationName | None = None,
        init: InitName | None = None,
        mlp_ratio: float | None = None,
        norm: NormName | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        if pretrained and init_cfg:
            raise ArgumentError(
                f"pretrained={pretrained!r} and init_cfg={init_cfg!r} are both given, but the "
                "first is a short form of the second. Give only one."
            )
        if pretrained:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        super().__init__(init_cfg=init_cfg)
        changes = {
            "drop_path_rate": drop_path_rate,
            "d_state": d_state,
            "ssm_ratio": ssm_ratio,
            "dt_rank": dt_rank,
            "scan": scan,
            "gated": gated,
            "dwconv": dwconv,
            "dwconv_bias": dwconv_bias,
            "act": act,
            "init": init,
            "mlp_ratio": mlp_ratio,
            "norm": norm,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        self.arch = arch = dataclasses.replace(self.find_arch(arch), **changes)
        stages = len(arch.depths)
        self.out_indices = _stage_indices(
            range(stages) if out_indices is None else out_indices, stages
        )
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= stages:
            raise ArgumentError(
                f"frozen_stages={frozen_stages!r} must be an integer from -1 (nothing) to {stages}."
            )
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ArgumentError(f"in_channels={in_channels!r} must be an integer of at least 1.")
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.in_channels = in_channels

        # Channels, stride and module of each stage's map; timm's name and form.
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"}
            for i, dim in enumerate(arch.dims)
        ]

        self.patch_embed = build_stem(arch.stem, in_channels, arch.dims[0], arch.norm)
        last = max(sum(arch.depths) - 1, 1)
        rates = (arch.drop_path_rate * i / last for i in itertools.count())
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(arch.depths):
            layer = nn.Sequential()
            layer.blocks = nn.Sequential(
                *(self._build_block(stage, next(rates), with_cp) for _ in range(depth))
            )
            if stage < stages - 1:
                layer.downsample = build_downsample(
                    arch.downsample, arch.dims[stage], arch.dims[stage + 1], arch.norm
                )
            self.layers.append(layer)
        if outnorm:
            for i in self.out_indices:
                self.add_module(f"outnorm{i}", build_norm(arch.norm, arch.dims[i]))
        self.outnorm = outnorm

        self.apply(init_module)
        self._register_load_state_dict_pre_hook(accept_conv_weights, with_module=True)
        self._freeze_stages()

    @classmethod
    def find_arch(cls, arch: str | dict) -> Arch:
        """Looks an architecture up by name, or makes it from a dict.

        Raises:
            ArgumentError: If the name or an attribute is unknown; the message lists the known ones.
        """
        if isinstance(arch, str):
            name = cls.arch_aliases.get(arch, arch)
            if name not in cls.arch_settings:
                known = (*cls.arch_aliases, *cls.arch_settings)
                raise ArgumentError(
                    f"arch={arch!r} is unknown{_suggest(arch, known)} Choose from "
                    f"{', '.join(known)}, or give a dict."
                )
            return cls.arch_settings[name]
        if not isinstance(arch, dict):
            raise ArgumentError(f"arch must be a name or a dict, got {type(arch).__name__}.")
        fields = {f.name: f for f in dataclasses.fields(Arch)}
        for name in arch:
            if name not in fields:
                raise ArgumentError(
                    f"arch has an unknown attribute {name!r}{_suggest(name, fields)} "
                    f"Known are {', '.join(fields)}."
                )
        missing = [name for name in ("dims", "depths") if name not in arch]
        if missing:
            raise ArgumentError(
                f"arch={arch!r} has no {' and no '.join(missing)}: a dict needs both."
            )
        return Arch(**arch)

    @staticmethod
    def of_one_block_a_stage(arch: "str | Arch", in_channels: int = 3) -> "VMamba":
        """A backbone that calls the same kernels as an architecture's own and is made sooner.

        Raises:
            ArgumentError: If there is no such architecture.
        """
        arch = arch if isinstance(arch, Arch) else VMamba.find_arch(arch)
        short = dataclasses.replace(arch, depths=[1] * len(arch.depths))
        return VMamba(dataclasses.asdict(short), in_channels=in_channels)

    def _build_block(self, stage: int, drop_path: float, with_cp: bool) -> VSSBlock:
        arch = self.arch
        dim, rank = arch.dims[stage], arch.rank(stage)
        common = {
            "dwconv": arch.dwconv,
            "dwconv_bias": arch.dwconv_bias,
            "act": arch.act,
            "init": arch.init,
            "drop": arch.ssm_drop,
        }
        if arch.mixer == "mamba2":
            op = Mamba2Mixer(dim, arch.d_state, arch.ssm_ratio, heads=rank, **common)
        else:
            op = SS2D(
                dim,
                arch.d_state,
                arch.ssm_ratio,
                dt_rank=rank,
                scan=arch.scan,
                gated=arch.gated,
                **common,
            )
        return VSSBlock(
            dim,
            op,
            arch.norm,
            arch.mlp_ratio,
            arch.mlp_act,
            mlp_drop=arch.mlp_drop,
            drop_path=drop_path,
            with_cp=with_cp,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the stages' maps.

        Args:
            x: Images, (B, in_channels, H, W), of any height and width.

        Returns:
            For each stage i of `out_indices`, in ascending order, a contiguous map
            (B, C_i, H_i, W_i) with strides of about 4, 8, 16 and 32 pixels. Stages after the last
            of them are not computed.

        Raises:
            ValueError: If `x` is no such tensor of floating-point numbers, or an image side is
                smaller than what the stem and the downsampling take.
        """
        check_images(x, self.in_channels, self.arch.min_size)
        prepare(self, x)
        x = self._embed(x)
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer.blocks(x)
            if i in self.out_indices:
                outs.append(self._output(i, x))
            if i == self.out_indices[-1]:
                break
            x = layer.downsample(x)
        return tuple(outs)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last of the maps alone, as timm's models have it."""
        return self(x)[-1]

    @property
    def num_features(self) -> int:
        """Channels of the last map; timm's name."""
        return self.arch.dims[self.out_indices[-1]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches `with_cp` of all blocks; timm's name."""
        for module in self.modules():
            if isinstance(module, VSSBlock):
                module.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters of the scans that Mamba trains without weight decay, for timm's optimisers."""
        names = ("A_logs", "Ds", "dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in names}

    def _embed(self, x: Tensor) -> Tensor:
        # Channels last in memory, in words that vmap knows.
        return self.patch_embed(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))

    def _output(self, stage: int, x: Tensor) -> Tensor:
        if self.outnorm:
            x = normalize(self.arch.norm, getattr(self, f"outnorm{stage}"), x)
        # NCHW in memory too: convolutions pass channels-last strides on, and mmcv 2.1's operators
        # (RoIAlign among them) read such maps as if they were NCHW, silently.
        return x.permute(0, 3, 1, 2).contiguous()

    def compile(
        self,
        *,
        backend: str | Callable = "inductor",
        mode: str | None = None,
        options: dict | None = None,
        **others,
    ) -> None:
        """Compiles the forward pass in place, by `torch.compile` with `COMPILE_OPTIONS`.

        Args:
            backend: As `torch.compile`'s.
            mode: As `torch.compile`'s; not together with `options`.
            options: As `torch.compile`'s, before ours.
            **others: Further arguments of `torch.compile`.
        """
        if backend == "inductor" and (mode is None or options is None):
            # A mode is a name for options, and PyTorch takes one or the other.
            named = list_mode_options(mode) if mode else options or {}
            mode, options = None, COMPILE_OPTIONS | named
        super().compile(backend=backend, mode=mode, options=options, **others)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Tells a parameter's depth for layer-wise learning-rate decay.

        Args:
            param_name: The parameter's name in the whole model.
            prefix: What stands before the backbone's own names.

        Returns:
            The depth, 0 for the stem, and the number of depths. Whatever follows the stages, and
            parameters of other parts of the model, have the last depth.
        """
        depths = self.arch.depths
        num_layers = sum(depths) + 2
        name = param_name.removeprefix(prefix)
        part = name.split(".")[0]
        if not param_name.startswith(prefix) or part not in ("patch_embed", "pos_embed", "layers"):
            return num_layers - 1, num_layers
        if part != "layers":
            return 0, num_layers
        _, stage, part, block, *_ = name.split(".")
        before = sum(depths[: int(stage)])
        # A downsampling step goes with the last block of its stage.
        return before + (int(block) + 1 if part == "blocks" else depths[int(stage)]), num_layers

    def train(self, mode: bool = True) -> "VMamba":
        """Sets the mode; what is frozen keeps to evaluation, and batch norms for `norm_eval`."""
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        """What is not trained: the stages that were frozen, and whatever follows the last map.

        The latter is here so that files fit whatever the `out_indices`, and data parallelism would
        wait for its gradients.
        """
        last = self.out_indices[-1]
        modules = [*self.layers[last + 1 :]]
        if modules:
            modules.append(self.layers[last].downsample)
        if self.frozen_stages >= 0:
            modules += [self.patch_embed, *self.layers[: self.frozen_stages]]
        norms = (f"outnorm{i}" for i in range(self.frozen_stages))
        return modules + [getattr(self, name) for name in norms if hasattr(self, name)]

    def _freeze_stages(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)


# To tracers of torch.fx one call, for all sizes.
@fx.wrap
def check_images(x: Tensor, channels: int, least: int) -> None:
    """Checks what a backbone is given.

    Args:
        x: Expected to be images (B, channels, H, W) of floating-point numbers.
        channels: Channels of an image.
        least: The smallest side that the backbone can take, in pixels.

    Raises:
        ValueError: If it is anything else, or smaller.
    """
    is_image = isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()
    if not is_image or x.shape[1] != channels:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x)
        raise ValueError(
            f"the backbone takes floating-point images (B, {channels}, H, W), got {found}. In an "
            "OpenMMLab model, the data_preprocessor makes them from what the data set gives."
        )
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"images of {x.shape[-2]}x{x.shape[-1]} pixels are too small: the stem and the "
            f"downsampling of this backbone need at least {least}x{least}. Resize or pad them."
        )


def _stage_indices(out_indices: Sequence[int], stages: int) -> tuple[int, ...]:
    if isinstance(out_indices, int):
        out_indices = (out_indices,)
    for i in out_indices:
        if not isinstance(i, int) or not -stages <= i < stages:
            raise ArgumentError(
                f"out_indices={out_indices!r} contains {i!r}, which is not a stage: the backbone "
                f"has stages 0 to {stages - 1}."
            )
    indices = tuple(sorted({i % stages for i in out_indices}))
    if not indices:
        raise ArgumentError("out_indices is empty: give at least one stage.")
    return indices


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def init_module(module: nn.Module) -> None:
    """Linear layers as in Swin Transformer, norms as identity; the mixers' own stay as made."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, _BatchNorm)):
        for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
