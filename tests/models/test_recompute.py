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
    return LinearOf.apply(F.gelu(x), weight, bias, F.gelu, (x,))


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


def test_it_is_differentiable_once():
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        linear_of_gelu(x, weight, None).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("act", ["gelu", "silu", "relu"])
def test_the_input_of_the_last_layer_is_not_kept(act, monkeypatch):
    mlp = layers.Mlp(8, 32, act)
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    maps = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(recompute, "DEVICES", devices)
        maps.append(saved_bytes(lambda: mlp(x), mlp.parameters()) / (4 * x[..., 0].numel()))
    # The MLP's input and its hidden map, before the activation, after it, or both; relu keeps the
    # latter alone.
    assert maps == ([8 + 32, 8 + 32] if act == "relu" else [8 + 32, 8 + 2 * 32])


ARCHS = {
    "default": {},
    "two directions": {"scan": "bidi"},
    "cascade": {"scan": "cascade2d"},
    "gated": {"gated": True, "stem": "v1", "downsample": "v1", "mlp_ratio": 0.0},
    "Mamba-2": {"mixer": "mamba2", "dims": 16, "d_state": 4, "dt_rank": 4, "act": "gelu"},
    "batch norm": {"norm": "bn"},
    "other activation": {"mlp_act": "silu"},
    "relu": {"mlp_act": "relu"},
}
# Of 2 blocks, in_proj, out_proj, fc1 and fc2, and the reduction of patch merging, as far as a layer
# norm or an activation precedes them.
EXPECTED = {"gated": 3, "batch norm": 4, "relu": 6}


def linear_of_nodes(outs):
    """How many of `LinearOf`'s products are in the graph of these tensors."""
    seen, todo = set(), [out.grad_fn for out in outs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return sum("LinearOf" in node.name() for node in seen)


def randomise(model):
    """Parameters without structure: norms as they are made let few gradients through."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
@pytest.mark.parametrize("name", ARCHS)
def test_models_have_the_same_gradients(name, with_cp, precision, monkeypatch):
    torch.manual_seed(0)
    arch = {"dims": 8, "depths": [1, 1]} | ARCHS[name]
    model = VMamba(arch, drop_path_rate=0.0, with_cp=with_cp).train()
    randomise(model)
    images = torch.randn(2, 3, 32, 48)
    grads, results = None, []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(recompute, "DEVICES", devices)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outs = model(images)
        if not with_cp:
            assert linear_of_nodes(outs) == (EXPECTED.get(name, 8) if devices else 0)
        grads = grads or [torch.randn_like(out) for out in outs]
        torch.autograd.backward(outs, grads)
        results.append({k: p.grad for k, p in model.named_parameters()})
    largest = max(g.norm() for g in results[1].values() if g is not None)
    for key, expected in results[1].items():
        found = results[0][key]
        assert (found is None) == (expected is None), key
        # The same numbers by other products, in other orders of sums. Some gradients are nothing
        # but roundings, as that of a bias before a batch norm.
        tolerance = 2**-5 if precision == "autocast" else 1e-5
        if expected is not None and expected.norm() > 1e-4 * largest:
            assert (found - expected).norm() <= tolerance * expected.norm(), key


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
    "in place": lambda mlp: mlp.fc2.register_forward_pre_hook(add_in_place),
    "dropout": lambda mlp: setattr(mlp.drop, "p", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_map_that_changes_on_the_way_is_not_mistaken(change, monkeypatch):
    torch.manual_seed(0)
    mlp = layers.Mlp(8, 16, "gelu")
    CHANGES[change](mlp)
    x = torch.randn(1, 2, 2, 8, requires_grad=True)
    results = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(recompute, "DEVICES", devices)
        torch.manual_seed(1)
        y = mlp(x)
        assert linear_of_nodes([y]) == 0
        results.append(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("on_the_cpu")
def test_another_layer_in_the_place_of_ours_is_called():
    mlp = layers.Mlp(8, 16, "gelu")
    mlp.fc2 = nn.Sequential(mlp.fc2)
    calls = []
    mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
    y = mlp(torch.randn(1, 2, 2, 8, requires_grad=True))
    assert calls == [1]
    # A plain layer, called by a container of somebody else's.
    assert linear_of_nodes([y]) == 0


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("frozen", [False, True])
def test_origins_are_noted_where_there_will_be_a_backward_pass(frozen):
    norm = layers.LayerNorm(8).requires_grad_(not frozen)
    x = torch.randn(1, 2, 2, 8)
    assert hasattr(norm(x), "origin") != frozen
    with torch.no_grad():
        assert not hasattr(norm(x), "origin")
    with torch.inference_mode(), torch.enable_grad():
        assert not hasattr(norm(x), "origin")


@pytest.mark.usefixtures("on_the_cpu")
def test_mixed_dtypes_are_refused_as_ever():
    mlp = layers.Mlp(8, 16, "gelu")
    mlp.fc2.double()
    with pytest.raises(RuntimeError, match="dtype"):
        mlp(torch.randn(1, 2, 2, 8, requires_grad=True))


@pytest.mark.usefixtures("on_the_cpu")
def test_transforms_and_tracers_see_operations_that_they_know():
    torch.manual_seed(0)
    mlp = layers.Mlp(8, 16, "gelu")
    images = torch.randn(3, 2, 2, 8)
    assert linear_of_nodes([mlp(images)]) == 1

    def loss(parameters, image):
        return torch.func.functional_call(mlp, parameters, (image[None],)).square().sum()

    parameters = dict(mlp.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    expected = torch.autograd.grad(loss(parameters, images[1]), list(parameters.values()))
    torch.testing.assert_close([g[1] for g in found.values()], list(expected))
    traced = torch.jit.trace(mlp, images)
    assert "LinearOf" not in str(traced.inlined_graph)


@pytest.mark.usefixtures("on_the_cpu")
def test_compiled_autograd_goes_through():
    torch.manual_seed(0)
    mlp = layers.Mlp(8, 16, "gelu")
    x = torch.randn(1, 2, 2, 8, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    expected = torch.autograd.grad(mlp(x).square().sum(), leaves)
    loss = mlp(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close([t.grad for t in leaves], list(expected))


def test_gpus_keep_less(monkeypatch):
    """VMamba-T's training step at batch 128, on tensors of a GPU without contents."""
    case = Case("training", "autocast-bf16", 128, (224, 224))
    subject = find_subject("tiny", backbone_only=False)
    found = count_activations(subject, case).bytes
    monkeypatch.setattr(recompute, "DEVICES", set())
    kept = count_activations(subject, case).bytes
    assert found < 6e9
    assert kept > 8e9
