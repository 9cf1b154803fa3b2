"""Images of unusual sizes and kinds: what they need, what they give, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvmamba.models import VMamba

SMALL = {"dims": 8, "depths": [1, 1, 2, 1], "drop_path_rate": 0.0}
VANILLA = {"gated": True, "d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0} | {
    "stem": "v1",
    "downsample": "v1",
}
# The mixers and scans, and the most that one image of 2048x2048 takes in inference, and one of
# 1024x1024 in training, in maps of the first stage. Measured were 13, 20, 29 and 91, and 55 to 66,
# 82, 81 and 133; a quarter more is for other versions of PyTorch. The Mamba-2 mixer, in plain
# PyTorch, writes out all four paths.
ARCHS = {
    "cross2d": ({}, 17, 84),
    "unidi": ({"scan": "unidi"}, 17, 84),
    "bidi": ({"scan": "bidi"}, 17, 84),
    "cascade2d": ({"scan": "cascade2d"}, 26, 104),
    "vanilla": (VANILLA, 37, 104),
    "mamba2": ({"mixer": "mamba2", "d_state": 8, "dt_rank": 4}, 115, 168),
}

# MiB for one image of 2048x2048 in inference, the weights left out: measured (1356, 1344, 1402 and
# 2881), and a sixth more for other versions of PyTorch.
BOUNDS_OF_MODELS = {"tiny-s1l8": 1600, "tiny-s2l5": 1600, "vanilla-tiny": 1600, "tiny-m2": 3400}

# float32's rounding, over some ten layers and up to 1,024 positions of a scan, as for the numbers
# of the official implementation.
TOLERANCE = 1e-4

# Height, width: the last stage is one pixel high, or wide, in all but the second.
ODD = [(1, 4096), (33, 1025), (32, 1024), (4096, 1)]


def peaks(
    size: tuple[int, int], arguments: list[dict], *passes: str
) -> dict[str, list[tuple[float, bool]]]:
    """Peaks of resident memory in MiB and whether results are finite; see `peak_memory`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Memory that is freed goes back at once, so that peaks are of what is held.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
    }
    program = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, program, *map(str, size), json.dumps(arguments), *passes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")


@linux
@pytest.mark.parametrize(
    ("side", "passes"),
    [
        (768, ("forward", "training")),
        # Those that the bounds were measured at.
        pytest.param(1024, ("training",), marks=pytest.mark.slow),
        pytest.param(2048, ("forward",), marks=pytest.mark.slow),
    ],
)
def test_large_images_within_stated_memory(side, passes):
    arguments = [{"arch": SMALL | changes} for changes, *_ in ARCHS.values()]
    one_map = SMALL["dims"] * (side // 4) ** 2 * 4 / 2**20
    for what, found in peaks((side, side), arguments, *passes).items():
        for (name, bounds), (peak, finite) in zip(ARCHS.items(), found, strict=True):
            assert finite, (what, name)
            assert peak < bounds[1 if what == "forward" else 2] * one_map, (what, name)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("arch", BOUNDS_OF_MODELS)
def test_large_images_through_the_papers_models(arch):
    ((peak, finite),) = peaks((2048, 2048), [{"arch": arch}], "forward")["forward"]
    assert finite
    assert peak < BOUNDS_OF_MODELS[arch]


@pytest.mark.parametrize("size", ODD, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ARCHS)
def test_odd_sizes_match_float64(name, size, monkeypatch):
    """float32 with the backend of the machine, against float64 with the reference's."""
    torch.manual_seed(0)
    model = VMamba(SMALL | ARCHS[name][0])
    size = [max(side, model.arch.min_size) for side in size]
    image = torch.randn(1, 3, *size)
    found = maps_and_gradients(model, image)
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    expected = maps_and_gradients(model.double(), image.double())
    for part, reference in zip(found, expected, strict=True):
        assert torch.isfinite(part).all()
        assert (part - reference).norm() < TOLERANCE * reference.norm()


def maps_and_gradients(model: VMamba, image: torch.Tensor) -> list[torch.Tensor]:
    """The maps, the image's gradient and those of all parameters as one vector."""
    model.zero_grad()
    image = image.clone().requires_grad_()
    outs = model(image)
    # Weights of their own: the squares of normalised maps have next to no gradient.
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.double) for o in outs]
    torch.autograd.backward(outs, [w.to(image.dtype) for w in weights])
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [*outs, image.grad, gradients]


def test_an_empty_batch_gives_empty_maps_and_no_gradients():
    model = VMamba(SMALL)
    outs = model(torch.zeros(0, 3, 32, 32))
    assert [tuple(out.shape) for out in outs] == [
        (0, 8, 8, 8),
        (0, 16, 4, 4),
        (0, 32, 2, 2),
        (0, 64, 1, 1),
    ]
    sum(out.sum() for out in outs).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 0, 32), "images of 0x32 pixels are too small.*at least 1x1"),
        (
            torch.zeros(3, 32, 32),
            r"images \(B, 3, H, W\), got torch.float32 of shape \(3, 32, 32\)",
        ),
        (torch.zeros(1, 1, 32, 32), r"\(B, 3, H, W\), got torch.float32 of shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32).byte(), "floating-point images.*got torch.uint8 of shape"),
        (torch.zeros(1, 3, 32, 32).numpy(), "got <class 'numpy.ndarray'>.*data_preprocessor"),
        ([torch.zeros(3, 32, 32)], "got <class 'list'>.*data_preprocessor"),
    ],
    ids=["no rows", "no batch", "grey", "integers", "array", "list"],
)
def test_what_is_no_batch_of_images_is_refused_in_one_message(image, message):
    with pytest.raises(ValueError, match=message):
        VMamba(SMALL)(image)


def test_frozen_stages_have_no_gradients_and_stay_in_evaluation():
    model = VMamba(SMALL | {"norm": "bn", "drop_path_rate": 0.5}, frozen_stages=2)
    frozen = [model.patch_embed, *model.layers[:2], model.outnorm0, model.outnorm1]
    trained = [*model.layers[2:], model.outnorm2, model.outnorm3]
    for mode in (True, False, True):
        model.train(mode)
        assert not any(part.training for module in frozen for part in module.modules())
        assert all(part.training is mode for module in trained for part in module.modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    # So many that no block of a stage is left out in all of them.
    sum(out.square().mean() for out in model(torch.randn(16, 3, 32, 32))).backward()
    assert all(p.grad is None for module in frozen for p in module.parameters())
    assert all(p.grad is not None for module in trained for p in module.parameters())
    changed = {name for name, value in model.state_dict().items() if not value.equal(state[name])}
    assert changed
    assert not any(name.startswith(("patch_embed", "layers.0", "layers.1")) for name in changed)


@pytest.mark.parametrize("last", range(4))
def test_stages_after_the_last_map_are_neither_computed_nor_trained(last):
    full = VMamba(SMALL).eval()
    model = VMamba(SMALL, out_indices=(0, last)).train()
    # Files fit all the same.
    missing, unknown = model.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("outnorm") for name in unknown)
    image = torch.randn(2, 3, 64, 64)
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    for module in full.modules():
        # A layer with a hook is called, and rounds otherwise than the product in its place.
        module.register_forward_hook(lambda *_: None)
    outs = model(image)
    for out, stage in zip(outs, sorted({0, last}), strict=True):
        torch.testing.assert_close(out, full(image)[stage], rtol=0, atol=0)
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        unused = name.startswith(tuple(f"layers.{i}." for i in range(last + 1, 4)))
        unused |= name.startswith(f"layers.{last}.downsample.")
        assert parameter.requires_grad is not unused, name
        assert (parameter.grad is None) is unused, name
    assert not any(name.startswith(f"layers.{i}") for i in range(last + 1, 4) for name in called)
    assert f"layers.{last}.downsample" not in called
