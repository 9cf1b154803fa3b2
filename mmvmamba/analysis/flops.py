"""Parameters and FLOPs of classifiers, detectors and segmentors, the selective scan included.

The paper's convention, which is that of fvcore and mmengine's analysis: a multiply-add is one FLOP,
a normalisation with weights five per element (two in evaluation for batch norm), other element-wise
operations nothing; a selective scan 9 N per channel, position and direction, and one for the skip
(https://github.com/state-spaces/mamba/issues/110). Shapes are all that counting needs: models run
on tensors without values, so that a detector at 1280x800 takes neither memory nor time.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmvmamba.analysis.measured import image_channels
from mmvmamba.analysis.subjects import PlainModel, build_classifier
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import scope_of
from mmvmamba.models.complexity import count_selective_scan_2d
from mmvmamba.registry import MODELS

# Height and width at which the paper gives each task's FLOPs.
PAPER_SHAPES = {"mmpretrain": (224, 224), "mmdet": (800, 1280), "mmseg": (512, 2048)}


@dataclass(frozen=True)
class ModuleComplexity:
    """One module with all that is inside it.

    Attributes:
        name: Its name in the model, '' for the model itself.
        kind: Its class.
        depth: How many modules it is inside of, lists not counted: a stage of a backbone has 2.
        params: Number of parameters.
        flops: FLOPs of one image.
    """

    name: str
    kind: str
    depth: int
    params: int
    flops: int


@dataclass(frozen=True)
class Complexity:
    """What a model costs on one image.

    Attributes:
        shape: Height and width of the image in pixels.
        modules: The model and every module in it that costs something, in the model's order.
        operators: FLOPs by operator.
    """

    shape: tuple[int, int]
    modules: tuple[ModuleComplexity, ...]
    operators: dict[str, int]

    @property
    def params(self) -> int:
        """Number of parameters of the model."""
        return self.modules[0].params

    @property
    def flops(self) -> int:
        """FLOPs of the model."""
        return self.modules[0].flops

    def as_dict(self, depth: int) -> dict:
        """The figures as plain data, of modules down to a depth."""
        modules = [dataclasses.asdict(m) for m in self.modules if m.depth <= depth]
        return {
            "shape": list(self.shape),
            "params": self.params,
            "flops": self.flops,
            "modules": modules,
            "operators": self.operators,
        }


def count_config(cfg: Config, shape: tuple[int, int] | None = None) -> Complexity:
    """Counts a config's model, which may be of mmpretrain, mmdet or mmseg.

    A model of two stages is counted with as many proposals as its `test_cfg.rpn` allows, and masks
    for as many as mmdet's plain forward pass predicts (100 in Mask R-CNN). Auxiliary heads, which
    only training runs, have parameters and no FLOPs.

    Args:
        cfg: The config. Its checkpoints are not read.
        shape: Height and width of the image in pixels; None for `PAPER_SHAPES`.

    Returns:
        The figures of one image in evaluation mode.

    Raises:
        UsageError: If the config does not say which task it is, or the task is none of the three.
    """
    scope = scope_of(cfg)
    if scope not in PAPER_SHAPES:
        raise UsageError(
            f"{cfg.filename} is of {scope!r}; FLOPs are counted for {', '.join(PAPER_SHAPES)}."
        )

    def call(model: nn.Module, images: Tensor) -> None:
        if scope == "mmdet":
            _skip_what_depends_on_values(model)
        # Not called as a module, which would stand in the report.
        PlainModel(scope, model).forward(images)

    return _count(_builder(cfg), call, shape or PAPER_SHAPES[scope])


def build_structure(cfg: Config) -> nn.Module:
    """Builds a config's model on the meta device: its parameters have shapes and no values.

    Raises:
        UsageError: If the config does not say which task it is.
    """
    return _build_on_meta(_builder(cfg))


def _builder(cfg: Config) -> Callable[[], nn.Module]:
    scope = scope_of(cfg)

    def build() -> nn.Module:
        # Detectors write into the parts that they are made of.
        model = deepcopy(cfg.model)
        if model.get("backbone", {}).get("pretrained"):
            model.backbone.pretrained = None
        return MODELS.build(model | {"_scope_": scope})

    return build


def _build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:
        # Some models compute with values as they are made (drop path rates, mostly).
        return build().to("meta")


def count_classifier(name: str, shape: tuple[int, int] | None = None) -> Complexity:
    """Counts a classifier of 1000 classes.

    Args:
        name: An arch of `VMamba`, a short name of another backbone or a model of timm; see
            `build_classifier`.
        shape: Height and width of the image in pixels; None for 224x224.

    Returns:
        The figures of one image.

    Raises:
        ValueError: If there is no such arch or model.
    """

    def call(model: nn.Module, images: Tensor) -> None:
        model(images)

    shape = shape or PAPER_SHAPES["mmpretrain"]
    return _count(lambda: build_classifier(name, shape), call, shape)


def count_model(
    model: nn.Module, call: Callable[[nn.Module], object], shape: tuple[int, int]
) -> Complexity:
    """Counts what a call of a model computes.

    Args:
        model: The model, on the CPU: the operators that are fused on a GPU have no formulas here.
        call: Runs the model.
        shape: Height and width of the image, for the record.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    # The counter names modules from the outermost one that is called.
    root = _Root(model, call)
    # Fused attention has no formula on every device; written out, it is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        root()
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    operators = Counter({str(op): n for op, n in counter.get_flop_counts()["Global"].items()})
    _, (whole, *parts) = _modules(model, "", 0, f"{type(root).__name__}.model", counts)
    # What the call computes outside the model's own forward pass belongs to the model.
    whole = dataclasses.replace(whole, flops=counts.get("Global", 0))
    return Complexity(shape, (whole, *parts), dict(operators.most_common()))


class _Root(nn.Module):
    def __init__(self, model: nn.Module, call: Callable[[nn.Module], object]):
        super().__init__()
        self.model, self._call = model, call

    def forward(self) -> None:
        self._call(self.model)


def _modules(
    module: nn.Module, name: str, depth: int, counted_as: str, counts: Mapping[str, int]
) -> tuple[int, list[ModuleComplexity]]:
    """A module's FLOPs, and the records of it and of what is in it."""
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
    inside, records = 0, []
    for own, child in module.named_children():
        path = f"{name}.{own}" if name else own
        part, inner = _modules(child, path, depth + (not is_list), f"{counted_as}.{own}", counts)
        inside += part
        records += inner
    # Of a module whose forward is not called, only the parts are known.
    flops = counts.get(counted_as, inside)
    params = sum(p.numel() for p in module.parameters())
    if not is_list and (params or flops or not name):
        record = ModuleComplexity(name, type(module).__name__, depth, params, flops)
        records.insert(0, record)
    return flops, records


def _count(
    build: Callable[[], nn.Module],
    call: Callable[[nn.Module, Tensor], None],
    shape: tuple[int, int],
) -> Complexity:
    """Counts on tensors without values; where a model needs values, on the CPU with zeros."""

    def run(model: nn.Module) -> Complexity:
        images = torch.zeros(1, image_channels(model), *shape)
        return count_model(model.eval(), lambda m: call(m, images), shape)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = _build_on_meta(build)
    with fake:
        _pretend_to_be_on_the_cpu(model)
    try:
        with fake:
            return run(model)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print_log(
            f"the model needs values to run and is counted on a real image: {reason}",
            logger="current",
            level=logging.WARNING,
        )
        return run(build())


def _pretend_to_be_on_the_cpu(model: nn.Module) -> None:
    """Turns tensors on the meta device into fake ones: what a model does depends on the device."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    # Of the same kind: some models look for parameters.
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[tensor] = fake
                tensors[name] = fakes[tensor]


def _skip_what_depends_on_values(detector: nn.Module) -> None:
    """Makes proposals of the full number, and empties RoI pooling, which counts as nothing."""
    from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
    from mmengine.structures import InstanceData

    if getattr(detector, "with_rpn", False):
        number = detector.test_cfg.rpn.max_per_img

        def propose(scores: Sequence[Tensor], *_, **__) -> list[InstanceData]:
            images = scores[0].shape[0]
            boxes = scores[0].new_tensor([0.0, 0.0, 32.0, 32.0]).expand(number, 4)
            return [InstanceData(bboxes=boxes.clone()) for _ in range(images)]

        detector.rpn_head.predict_by_feat = propose
    for module in detector.modules():
        if isinstance(module, BaseRoIExtractor):
            module.forward = _pooled_to_nothing(module)


def _pooled_to_nothing(extractor: nn.Module) -> Callable[..., Tensor]:
    def forward(feats: Sequence[Tensor], rois: Tensor, *_, **__) -> Tensor:
        size = extractor.roi_layers[0].output_size
        return feats[0].new_zeros(len(rois), extractor.out_channels, *size)

    return forward


def _formulas() -> dict:
    """FLOPs by operator in the paper's convention."""
    aten, ours = torch.ops.aten, torch.ops.mmvmamba
    formulas = {
        aten.native_layer_norm: _per_input(lambda _shape, weight, *_: _norm(weight)),
        aten.native_group_norm: _per_input(lambda weight, *_: _norm(weight)),
        aten.native_batch_norm: _per_input(_batch_norm),
        aten._adaptive_avg_pool2d: _per_input(lambda *_: 1),
        aten.upsample_nearest2d: _per_output(1),
        aten.upsample_bilinear2d: _per_output(4),
        aten.grid_sampler_2d: _per_output(4),
        ours.selective_scan_2d: count_selective_scan_2d,
    }
    # The counter splits an operator into others unless its overload has a formula too.
    formulas |= {op.default: formula for op, formula in formulas.items()}
    # PyTorch's own formulas count a multiply-add as two.
    products = {op: f for op, f in flop_registry.items() if str(op).startswith("aten.")}
    return formulas | {op: _halved(formula) for op, formula in products.items()}


def _norm(weight: Tensor | None) -> int:
    return 4 if weight is None else 5


def _batch_norm(weight: Tensor | None, _bias, _mean, _var, training: bool, *_) -> int:
    return _norm(weight) if training else 1 + (weight is not None)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Marks a formula that takes tensors; the counter gives others their shapes."""
    formula._get_raw = True
    return formula


def _halved(formula: Callable[..., int]) -> Callable[..., int]:
    return _raw(lambda *args, **kwargs: formula(*args, **kwargs) // 2)


def _per_input(factor: Callable[..., int]) -> Callable[..., int]:
    return _raw(lambda x, *args, **_: x.numel() * factor(*args))


def _per_output(factor: int) -> Callable[..., int]:
    return _raw(lambda *_, out_val, **__: out_val.numel() * factor)


def plot_flops(
    curves: Mapping[str, Sequence[Complexity]], out_file: str | Path, title: str = ""
) -> None:
    """Draws FLOPs over the image's side (paper, figure 4 (b)).

    Args:
        curves: For each model its figures at several sizes.
        out_file: The picture to write, of any format of matplotlib; its folder is made if need be.
        title: A line above the plot.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    sides = {}
    for name, results in curves.items():
        points = sorted((prod(r.shape) ** 0.5, r.flops / 1e9) for r in results)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
        sides |= dict(points)
    axes.set_xticks(sorted(sides))
    axes.set(xlabel="image side (pixels)", ylabel="FLOPs (G)", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file, dpi=150)
