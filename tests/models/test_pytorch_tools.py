"""PyTorch's own tools, and those that work alike, on the backbone.

Hooks, pruning, parametrisations, transforms, savers, tracers, quantisation, batch norms of many
processes, and timm's names.
"""

import copy

import mmengine.model
import pytest
import torch
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.distributed import HashStore
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

from mmvmamba.analysis.flops import count_model
from mmvmamba.models import SS2D, Mamba2Mixer, VMamba, official, recompute
from mmvmamba.timm import offer_models

KINDS = {
    "default": {},
    "gated": {"gated": True, "stem": "v1", "downsample": "v1", "d_state": 2},
    "mamba2": {"mixer": "mamba2", "d_state": 4},
    "batch norm": {"norm": "bn"},
}


@pytest.fixture(params=KINDS)
def model(request) -> VMamba:
    torch.manual_seed(0)
    return VMamba({"dims": 16, "depths": (1, 1)} | KINDS[request.param]).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    """Float32 sums of up to 256 products in another order, of maps near one."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def loss(model, parameters, images):
    return sum(out.square().mean() for out in functional_call(model, parameters, (images,)))


@pytest.mark.parametrize("recorded", [False, True])
def test_hooks_of_every_module_run(model, images, recorded):
    with torch.set_grad_enabled(recorded):
        expected = model(images)
        seen = set()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _m, _a, _o, name=name: seen.add(name))
        close(model(images), expected)
    unseen = {name for name, _ in model.named_modules()} - seen
    # Containers of ours, which have no forward pass.
    assert unseen == {"layers", "layers.0", "layers.1"}


def test_pruned_weights_are_the_masked_ones(model, images):
    masked = copy.deepcopy(model)
    for module, other in zip(model.modules(), masked.modules(), strict=True):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            prune.random_unstructured(module, "weight", 0.5)
            with torch.no_grad():
                other.weight.mul_(module.weight_mask)
    with torch.no_grad():
        close(model(images), masked(images))


def test_normalised_weights_follow_their_parameters(model, images):
    expected = [out.detach() for out in model(images)]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        parametrizations.weight_norm(layer)
    close(model(images), expected)
    for layer in layers:
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)
            changed = model(images)
            assert any(not torch.equal(a, b) for a, b in zip(changed, expected, strict=True))
            layer.parametrizations.weight.original0.div_(1.5)


def test_a_module_in_the_place_of_ours_is_called(images):
    torch.manual_seed(0)
    model = VMamba({"dims": 16, "depths": (1,)}).eval()
    block = model.layers[0].blocks[0]
    for part, name in ((block, "norm2"), (block.op, "out_norm"), (block.op, "conv2d")):
        replaced = copy.deepcopy(model).layers[0].blocks[0]
        owner = replaced if part is block else replaced.op
        x = torch.randn(1, 5, 6, 16)
        expected = replaced(x)
        # Its own forward pass on the instance, as accelerate sets it.
        module, calls = getattr(owner, name), []
        forward = module.forward
        module.forward = lambda x, forward=forward, calls=calls: (calls.append(1), forward(x))[1]
        close([replaced(x)], [expected])
        assert calls
        # Not of our types, and the same function.
        setattr(owner, name, nn.Sequential(module))
        close([replaced(x)], [expected])
        getattr(owner, name).append(nn.Hardtanh(-0.1, 0.1))
        assert not torch.allclose(replaced(x), expected)


def test_parameters_are_contiguous_for_savers_and_vectors(model, images, tmp_path):
    assert all(p.is_contiguous() for p in model.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        expected = model(images)
        vector_to_parameters(1 * parameters_to_vector(model.parameters()), model.parameters())
        close(model(images), expected)

    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(loss(model, {}, images))
        losses[-1].backward()
        return losses[-1]

    optimizer.step(closure)
    assert losses[1] < losses[0]


def test_gradients_by_transform_are_autograds(model, images):
    parameters = dict(model.named_parameters())
    found = grad(lambda p: loss(model, p, images))(parameters)
    loss(model, parameters, images).backward()
    close(found.values(), [p.grad for p in parameters.values()])


def test_transforms_over_images_are_a_loop_over_them(model, images):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        close(vmap(lambda one: model(one[None]))(images), [out[:, None] for out in model(images)])

    gradient = grad(lambda p, one: loss(model, p, one[None]))
    per_sample = vmap(gradient, in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = gradient(parameters, image)
        close([g[i] for g in per_sample.values()], expected.values())


def test_gradients_of_a_mapped_model_whose_weights_are_frozen(model, images):
    model.requires_grad_(False)
    found = grad(lambda batch: vmap(lambda one: model(one[None])[0])(batch).square().mean())(images)
    images.requires_grad_()
    model(images)[0].square().mean().backward()
    close([found], [images.grad])


def test_a_wider_depthwise_convolution_is_computed_as_it_says(images):
    torch.manual_seed(0)
    block = VMamba({"dims": 16, "depths": (1,)}).eval().layers[0].blocks[0]
    block.op.conv2d = nn.Conv2d(16, 16, 5, padding=2, groups=16)
    x = torch.randn(1, 6, 7, 16)
    with torch.no_grad():
        found = block(x)
    close([found], [copy.deepcopy(block).double()(x.double()).float()])


def test_a_jacobian_is_made_of_gradients():
    torch.manual_seed(0)
    model = VMamba({"dims": 8, "depths": (1,)}).eval()
    image = torch.randn(1, 3, 8, 8)

    def means(image):
        return model(image)[0].mean((0, 2, 3))

    jacobian = jacrev(means)(image)
    image.requires_grad_()
    outputs = means(image)
    for row, output in zip(jacobian, outputs, strict=True):
        close([row], torch.autograd.grad(output, image, retain_graph=True))


def test_fx_records_blocks_as_calls(model, images):
    traced = fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"layers.0.blocks.0", "layers.1.blocks.0", "outnorm1"} <= called
    with torch.no_grad():
        for batch in (images, torch.randn(1, 3, 40, 72)):
            close(traced(batch), model(batch))
    with pytest.raises(ValueError, match="takes floating-point images"):
        traced(images.int())


@pytest.mark.parametrize("norm", ["ln", "ln2d", "bn"])
def test_fx_traces_the_official_modules(norm):
    torch.manual_seed(0)
    small = {"dims": 8, "depths": (1, 1), "num_classes": 5, "norm_layer": norm}
    model = official.VSSM(**small, forward_type="v05_noz", downsample_version="v3").eval()
    batch = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        close([fx.symbolic_trace(model)(batch)], [model(batch)])


@pytest.mark.parametrize(
    "mixer", [SS2D(8), official.SS2D(8, channel_first=True), Mamba2Mixer(8, heads=2)]
)
def test_fx_records_mixers_as_calls(mixer):
    batch, network = torch.randn(1, 8, 8, 8), nn.Sequential(mixer)
    with torch.no_grad():
        close([fx.symbolic_trace(network)(batch)], [network(batch)])


def test_fx_refuses_hooks_that_would_run_twice(model):
    hook = model.layers[0].blocks[0].register_forward_hook(lambda _m, _a, out: 2 * out)
    with pytest.raises(ValueError, match=r"^layers\.0\.blocks\.0 has hooks, which would run twice"):
        fx.symbolic_trace(model)
    hook.remove()
    fx.symbolic_trace(model)


def test_torchvision_extracts_the_result_of_a_block(model, images):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = {"layers.0.blocks.0": "block", "outnorm1": "map"}
    extractor = extraction.create_feature_extractor(model, names, suppress_diff_warning=True).eval()
    seen = {}
    model.layers[0].blocks[0].register_forward_hook(lambda _m, _a, out: seen.update(block=out))
    with torch.no_grad():
        last = model(images)[-1]
        found = extractor(images)
    channels_first = KINDS.get("batch norm") == {"norm": model.arch.norm}
    norm = found["map"] if channels_first else found["map"].permute(0, 3, 1, 2)
    close([found["block"], norm], [seen["block"], last])


def test_dynamic_quantisation_converts_every_linear_layer(model, images):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    converted = {name for name, m in quantised.named_modules() if isinstance(m, kind)}
    assert converted == {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    check_rounded(quantised, model, images)


def check_rounded(rounded, model, images):
    """Weights of eight bits, and of a few channels: errors of some hundredths."""
    with torch.no_grad():
        for found, expected in zip(rounded(images), model(images), strict=True):
            assert 0 < (found - expected).norm() <= 0.05 * expected.norm()


class Int8Weight(torch.Tensor):
    """A weight that only `F.linear` takes, as weight-only quantisation makes them."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, *_):
        return cls(**parts)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *rest = args
            return F.linear(x, weight.codes * weight.scale, *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} of an Int8Weight")


@pytest.mark.parametrize("recomputing", [False, True])
def test_weights_of_other_types_go_to_linear_layers_alone(recomputing, model, images, monkeypatch):
    monkeypatch.setattr(recompute, "DEVICES", {"cpu"} if recomputing else set())
    rounded = copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().char()
            layer.weight = nn.Parameter(Int8Weight(codes, scale), requires_grad=False)
    check_rounded(rounded, model, images)
    # Adapters train other parameters beside such weights.
    sum(out.square().mean() for out in rounded(images)).backward()
    assert rounded.patch_embed[0].weight.grad.abs().sum() > 0


def test_torchao_quantises_every_linear_layer(model, images):
    quantization = pytest.importorskip("torchao.quantization")
    rounded = copy.deepcopy(model)
    quantization.quantize_(rounded, quantization.Int8WeightOnlyConfig())
    for layer in rounded.modules():
        assert not isinstance(layer, nn.Linear) or type(layer.weight) is not nn.Parameter
    check_rounded(rounded, model, images)


# The first map has as many rows as channels, the case that gives no error.
SQUARE = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "convert",
    [nn.SyncBatchNorm.convert_sync_batchnorm, mmengine.model.convert_sync_batchnorm],
    ids=["torch", "mmengine"],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_batch_norms_that_are_made_synchronous_are_the_same(convert, version):
    torch.manual_seed(0)
    arch = {"dims": 16, "depths": (1, 1), "norm": "bn", "stem": version, "downsample": version}
    model = VMamba(arch, drop_path_rate=0.0).train()
    converted = convert(copy.deepcopy(model))
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in converted.modules()].count(nn.SyncBatchNorm) == len(kinds) > 0
    # In training, with the statistics of this process, the only one.
    close(converted(SQUARE), model(SQUARE))
    reverted = mmengine.model.revert_sync_batchnorm(copy.deepcopy(converted))
    for network in (converted, reverted):
        close(network.state_dict().values(), model.state_dict().values())
        close(network.eval()(SQUARE), model.eval()(SQUARE))


def test_batch_norms_of_mmcv_are_the_same_in_evaluation():
    pytest.importorskip("mmcv.ops")
    torch.manual_seed(0)
    model = VMamba({"dims": 16, "depths": (1, 1), "norm": "bn"}).train()
    model(SQUARE)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        converted = mmengine.model.convert_sync_batchnorm(copy.deepcopy(model), "mmcv")
    finally:
        torch.distributed.destroy_process_group()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    close(converted.eval()(SQUARE), model.eval()(SQUARE))


def test_mmengines_counter_counts_what_ours_counts(model, images):
    image = images[:1]
    analyzer = FlopAnalyzer(model, (image,))
    complexity = count_model(model, lambda m: m(image), image.shape[-2:])
    scan = "state_space_dual" if model.arch.mixer == "mamba2" else "selective_scan_2d"
    assert analyzer.by_operator()[scan] == complexity.operators[f"mmvmamba.{scan}"]
    if model.arch.norm == "ln":
        # It takes an einsum's cost from NumPy, which does not give whole numbers.
        assert analyzer.total() == pytest.approx(complexity.flops, abs=10)


def test_names_of_timm(model, images):
    with torch.no_grad():
        maps = model(images)
        assert torch.equal(model.forward_features(images), maps[-1])
    assert model.num_features == maps[-1].shape[1]
    for info, out in zip(model.feature_info, maps, strict=True):
        assert out.shape[1:] == (info["num_chs"], *(32 // info["reduction"],) * 2)
        model.get_submodule(info["module"])
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert all(layer.blocks[0].with_cp is enable for layer in model.layers)
    kept = model.no_weight_decay()
    assert {name.rpartition(".")[2] for name in kept} == {"A_logs", "Ds", "dt_projs_bias"}
    assert kept < {name for name, _ in model.named_parameters()}


def test_timm_is_told_what_there_is_not():
    timm = pytest.importorskip("timm")
    offer_models()
    assert {"vmamba_base", "vmamba_vanilla_tiny", "vmamba_tiny_m2"} <= set(timm.list_models())
    import mmvmamba.timm

    # timm lists the functions it was given in their module's `__all__`.
    assert all(hasattr(mmvmamba.timm, name) for name in mmvmamba.timm.__all__)
    with pytest.raises(ValueError, match="vmamba_tiny is a backbone without a classifier"):
        timm.create_model("vmamba_tiny")
    with pytest.raises(ValueError, match="vmamba_tiny has no weights at timm"):
        timm.create_model("vmamba_tiny", pretrained=True, features_only=True)
    with pytest.raises(TypeError, match="drop_rate"):
        timm.create_model("vmamba_tiny", features_only=True, drop_rate=0.1)
