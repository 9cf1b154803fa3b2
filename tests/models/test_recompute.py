"""Linear layers whose inputs are computed again: the same gradients, less memory, no surprises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.analysis.activations import count_activations, saved_bytes
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.models import VMamba, layers, recompute
from mmvmamba.models.recompute import LinearOf


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets the CPU do what GPUs do."""
    monkeypatch.setattr(recompute, "DEVICES", {"cpu"})


def linear_of_gelu(x, weight, bias):
    return LinearOf.apply(F.gelu(x), weight, bias, F.gelu, x)


def plain(x, weight, bias):
    return F.linear(F.gelu(x), weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_it_is_what_pytorch_computes(dtype, frozen):
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).to(dtype) for shape in ((2, 5, 7, 24), (12, 24), (12,))]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i not in frozen)
    leaves = [t for t in tensors if t.requires_grad]
    grad = torch.randn(2, 5, 7, 12).to(dtype)
    results = []
    for function in (linear_of_gelu, plain):
        y = function(*tensors)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    # The same products; in bfloat16 another order of sums may round differently.
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-6
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_its_gradients_are_differentiable():
    torch.manual_seed(0)
    arguments = [torch.randn(*s).double().requires_grad_() for s in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(linear_of_gelu, arguments)
    assert torch.autograd.gradgradcheck(linear_of_gelu, arguments)


def test_it_goes_through_function_transforms():
    torch.manual_seed(0)
    arguments = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    results = [
        torch.func.grad(lambda *a, f=function: f(*a).square().sum(), argnums=(0, 1, 2))(*arguments)
        for function in (linear_of_gelu, plain)
    ]
    torch.testing.assert_close(*results)


def test_the_input_is_not_kept():
    x = torch.randn(2, 3, 4, 24, requires_grad=True)
    weight, bias = torch.randn(12, 24, requires_grad=True), torch.zeros(12, requires_grad=True)
    assert saved_bytes(lambda: linear_of_gelu(x, weight, bias), []) == 4 * (x.numel() + 12 * 24)
    assert saved_bytes(lambda: plain(x, weight, bias), []) == 4 * (2 * x.numel() + 12 * 24)


ARCHS = {
    "default": {},
    "two directions": {"scan": "bidi"},
    "cascade": {"scan": "cascade2d"},
    "gated": {"gated": True, "stem": "v1", "downsample": "v1", "mlp_ratio": 0.0},
    "Mamba-2": {"mixer": "mamba2", "dims": 16, "d_state": 4, "dt_rank": 4, "act": "gelu"},
    "batch norm": {"norm": "bn"},
    "other activation": {"mlp_act": "relu"},
}
# Of 2 blocks, in_proj, out_proj, fc1 and fc2, and the reduction of patch merging, as far as a layer
# norm or an activation precedes them.
EXPECTED = {"gated": 3, "batch norm": 4}


def linear_of_nodes(outs):
    """How many of `LinearOf`'s products are in the graph of these tensors."""
    seen, todo = set(), [out.grad_fn for out in outs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return sum("LinearOf" in node.name() for node in seen)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
@pytest.mark.parametrize("name", ARCHS)
def test_models_have_the_same_gradients(name, with_cp, precision, monkeypatch):
    torch.manual_seed(0)
    arch = {"dims": 8, "depths": [1, 1]} | ARCHS[name]
    model = VMamba(arch, drop_path_rate=0.0, with_cp=with_cp).train()
    images = torch.randn(2, 3, 32, 48)
    results = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(recompute, "DEVICES", devices)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outs = model(images)
        if not with_cp:
            expected = EXPECTED.get(name, 8) if devices else 0
            assert linear_of_nodes(outs) == expected
        sum((out.float() * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outs).backward()
        results.append({k: p.grad for k, p in model.named_parameters()})
    found, expected = results
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
    # The same numbers through other products: two routes of the CPU, in other orders of sums.
    found, expected = (
        torch.cat([g.flatten() for g in r.values() if g is not None]) for r in (found, expected)
    )
    tolerance = 2**-6 if precision == "autocast" else 1e-5
    assert (found - expected).norm() <= tolerance * expected.norm()


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(2 * x)


def add_in_place(_, arguments):
    arguments[0].add_(1)


CHANGES = {
    "pre-hook": lambda mlp: mlp.fc2.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "wrapper": lambda mlp: setattr(mlp, "fc2", Doubled(mlp.fc2)),
    "stand-in": lambda mlp: setattr(mlp, "fc2", nn.Linear(16, 8)),
    "in place": lambda mlp: mlp.fc2.register_forward_pre_hook(add_in_place),
    "dropout": lambda mlp: setattr(mlp.drop, "p", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("on_the_cpu")
def test_a_map_that_changes_on_the_way_is_not_mistaken(change):
    torch.manual_seed(0)
    mlp = layers.Mlp(8, 16, "gelu")
    CHANGES[change](mlp)
    y = mlp(torch.randn(1, 2, 2, 8, requires_grad=True))
    assert linear_of_nodes([y]) == 0
    y.sum().backward()


@pytest.mark.usefixtures("on_the_cpu")
def test_nothing_is_noted_without_a_backward_pass():
    mlp = layers.Mlp(8, 16, "gelu")
    x = torch.randn(1, 2, 2, 8)
    with torch.no_grad():
        assert not hasattr(layers.LayerNorm(8)(x), "origin")
        assert not mlp(x).requires_grad


def test_gpus_keep_less(monkeypatch):
    """VMamba-T's training step at batch 128, on tensors of a GPU without contents."""
    case = Case("training", "autocast-bf16", 128, (224, 224))
    subject = find_subject("tiny", backbone_only=False)
    found = count_activations(subject, case).bytes
    monkeypatch.setattr(recompute, "DEVICES", set())
    kept = count_activations(subject, case).bytes
    assert found < 6e9
    assert kept > 8e9
