"""PyTorch's own tools on the backbone: hooks, pruning, parametrisations, transforms, savers."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

from mmvmamba.models import VMamba

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
