"""Activation maps are the scan's own derivatives, at any length, and drawn where they belong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmvmamba.analysis import activation_maps
from mmvmamba.analysis.activation_maps import (
    KINDS,
    PathScan,
    Scan,
    capture,
    scan_of,
    scan_of_sequence,
)
from mmvmamba.models import VisionMamba, VMamba
from mmvmamba.models.compared.vision_mamba import Arch, BidirectionalMixer
from mmvmamba.models.ss2d import SCANS, SS2D, Mamba2Mixer, convolve
from mmvmamba_kernels.testing import paths, selective_scan_2d_oracle, selective_scan_oracle

HEIGHT, WIDTH, QUERY = 4, 5, (2, 3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_mixer(scan="cross2d", states=3, **kwargs):
    return SS2D(6, states, 2.0, 2, scan=scan, init="rand", **kwargs).double()


def make_map():
    return torch.randn(1, HEIGHT, WIDTH, 6, dtype=torch.float64)


def gradient_of(output, x):
    (grad,) = torch.autograd.grad(output, x)
    return grad


@pytest.mark.parametrize("pattern", ["cross2d", "unidi", "bidi"])
@pytest.mark.parametrize("states", [1, 3])
@torch.no_grad()
def test_contributions_are_the_derivatives_of_the_oracle(pattern, states):
    mixer, given = make_mixer(pattern, states), make_map()
    scan = scan_of(mixer, given)
    x = convolve(mixer.conv2d, mixer.act, mixer.in_proj(given))
    proj = torch.einsum("bhwd,kcd->bhwkc", x, mixer.x_proj_weight)
    A = -mixer.A_logs.float().exp().double().unflatten(0, (4, -1))
    arguments = (proj, mixer.dt_projs_weight, mixer.dt_projs_bias, A, torch.zeros(4, 12))
    found = scan.channel_maps(QUERY, "contribution")
    with torch.enable_grad():
        x = x.requires_grad_()
        y = selective_scan_2d_oracle(x, *arguments, pattern=pattern)
        # The scan of one channel does not see the others: all of them at once.
        expected = gradient_of(y[0, QUERY[0], QUERY[1]].sum(), x)[0]
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-8, atol=1e-8)
    assert expected.abs().max() > 1e-3

    for k, sequences in enumerate(paths(pattern, HEIGHT, WIDTH)):
        (sequence,) = sequences
        order = torch.tensor([i * WIDTH + j for i, j in sequence])
        step = sequence.index(QUERY)
        low_rank, B, C = proj[0, :, :, k].flatten(0, 1)[order].split([2, states, states], 1)
        dt = F.softplus(low_rank @ mixer.dt_projs_weight[k].mT + mixer.dt_projs_bias[k])
        with torch.enable_grad():
            u = x.detach().flatten(1, 2)[:, order].mT.requires_grad_()
            y = selective_scan_oracle(u, dt.mT[None], A[k], B.mT[None, None], C.mT[None, None])
            expected = gradient_of(y[0, :, step].sum(), u)[0].mT
        row = found[k].flatten(0, 1)[order]
        torch.testing.assert_close(row, expected, rtol=1e-8, atol=1e-8)
        assert (row[step + 1 :] == 0).all()
        # Without dt, the weight of equation 20; without w, the product alone.
        weighted = scan.channel_maps(QUERY, "weighted")[k].flatten(0, 1)[order]
        torch.testing.assert_close(weighted * dt, row)
        torch.testing.assert_close(
            scan.maps(QUERY, "qk")[k].flatten()[order][: step + 1], B[: step + 1] @ C[step]
        )


@pytest.mark.parametrize("scan", [*SCANS, "hilbert", "atrous2", "atrous3"])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_the_weights_give_what_the_mixer_gives(scan, gated):
    mixer, given = make_mixer(scan, gated=gated), make_map()
    found = scan_of(mixer, given)
    x = mixer.in_proj(given)
    x = convolve(mixer.conv2d, mixer.act, x.chunk(2, -1)[0] if gated else x)
    expected = mixer._scan(x)
    # The cascade's output is that of its second half, along columns.
    last = slice(2, 4) if scan == "cascade2d" else slice(mixer.directions)
    ks = range(mixer.directions)[last]
    y = torch.stack(
        [
            sum(outcome(found.paths[k], row * WIDTH + column, mixer, k) for k in ks)
            for row in range(HEIGHT)
            for column in range(WIDTH)
        ]
    )
    y = F.layer_norm(y, (12,), mixer.out_norm.weight, mixer.out_norm.bias, mixer.out_norm.eps)
    torch.testing.assert_close(y.view_as(expected), expected, rtol=1e-8, atol=1e-8)


def outcome(path: PathScan, position, mixer, k):
    place = path.find(position)
    if place is None:
        return 0
    sequence, step = place
    weights, x = path.row(sequence, step, "contribution"), path.x[sequence, : step + 1]
    width = x.shape[1] // weights.shape[1]
    skip = mixer.Ds.flatten().view(len(mixer.x_proj_weight), -1)[k]
    return (weights.repeat_interleave(width, 1) * x).sum(0) + skip * x[step]


@torch.no_grad()
def test_the_weights_give_what_the_mamba2_mixer_gives():
    mixer, given = Mamba2Mixer(6, 5, 2.0, heads=3, init="rand"), make_map()
    mixer = mixer.double()
    found = scan_of(mixer, given)
    expected = mixer._scan(convolve(mixer.conv2d[1], mixer.act, mixer.in_proj(given)))
    for position in (0, 7, HEIGHT * WIDTH - 1):
        y = sum(outcome(path, position, mixer, k) for k, path in enumerate(found.paths))
        torch.testing.assert_close(y, expected[0].flatten(0, 1)[position], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scan", [*SCANS, "diagonal", "atrous2"])
def test_a_row_of_the_matrix_is_the_map_of_its_query(scan):
    found = scan_of(make_mixer(scan), make_map())
    position = QUERY[0] * WIDTH + QUERY[1]
    for kind in KINDS:
        maps, diagonals = found.maps(QUERY, kind), found.diagonals(kind)
        for k, path in enumerate(found.paths):
            matrix = path.matrix(kind)
            assert (matrix.triu(1) == 0).all()
            row = found.aligned(k, matrix)[position]
            assert (path.find(position) is not None) == bool(row.any())
            torch.testing.assert_close(row, maps[k].flatten())
            # The order of the diagonal is that of the positions that are read.
            torch.testing.assert_close(
                diagonals[k].flatten()[path.positions.flatten()], matrix.diagonal()
            )


def test_long_sequences_with_large_steps_stay_right():
    """w itself would underflow after 75 steps: exp(-10 * 75) is zero in float64."""
    length, channels, states = 4096, 2, 2
    u = torch.randn(1, channels, length, dtype=torch.float64).requires_grad_()
    dt = torch.rand(1, channels, length, dtype=torch.float64) * 10
    dt[..., ::7] = 1e-3
    # One state forgets at once, one keeps a part over all the sequence.
    A = -torch.tensor([[1.0, 1e-4], [3.0, 1e-5]], dtype=torch.float64)
    B, C = torch.randn(2, 1, 1, states, length, dtype=torch.float64)
    y = selective_scan_oracle(u, dt, A, B, C)
    expected = gradient_of(y[0, :, -1].sum(), u)[0].mT
    positions = torch.arange(length)[None]
    path = PathScan("", positions, positions, C[0].mT, B[0].mT, dt.mT, A, u.detach().mT)
    row = path.row(0, length - 1, "contribution")
    assert row.isfinite().all()
    torch.testing.assert_close(row, expected, rtol=1e-8, atol=1e-12)
    # Something is left of the very first steps, and the quotient of w's could not tell it.
    assert row[0, 1].abs() > 1e-7
    assert (dt[0].cumsum(-1)[:, -1] * A[:, 0]).exp().max() == 0


def small_backbone():
    arch = {"dims": 8, "depths": (1, 2), "d_state": 2, "ssm_ratio": 1.0, "mlp_ratio": 2.0}
    return VMamba(arch).eval()


def test_capture_finds_every_block_and_its_input():
    model, image = small_backbone(), torch.randn(3, 32, 48)
    found = capture(model, image)
    assert [(mixed.stage, mixed.block) for mixed in found] == [(1, 1), (2, 1), (2, 2)]
    assert [tuple(mixed.x.shape) for mixed in found] == [(1, 8, 12, 8), *[(1, 4, 6, 16)] * 2]
    block = model.layers[0].blocks[0]
    torch.testing.assert_close(found[0].x, block.norm(model.patch_embed(image[None])))
    assert not block.op._forward_pre_hooks
    assert isinstance(found[2].scan(), Scan)


def vim_matrices(mixer, x):
    """Vim's two scans of (L, C) in float64, as matrices (D, L, L) that are multiplied out.

    Returns:
        For each direction, what each output takes from each input, and the inputs (L, D); in the
        sequence's own order.
    """
    found = []
    both = x @ mixer.in_proj.weight.mT
    for end, turn in (("", False), ("_b", True)):
        conv, x_proj, dt_proj = (
            getattr(mixer, f"{n}{end}") for n in ("conv1d", "x_proj", "dt_proj")
        )
        u = both.chunk(2, -1)[0]
        u = u.flip(0) if turn else u
        u = F.silu(conv(u.mT[None])[0, :, : len(x)]).mT
        low_rank, b, c = x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        dt = F.softplus(dt_proj(low_rank))
        rates = -getattr(mixer, f"A{end}_log").exp()
        matrix = torch.zeros(u.shape[1], len(x), len(x), dtype=torch.float64)
        for i in range(len(x)):
            state = dt[i, :, None] * b[i]
            for t in range(i, len(x)):
                state = state * (rates * dt[t, :, None]).exp() if t > i else state
                matrix[:, t, i] = (state * c[t]).sum(-1)
        found.append((matrix.flip(1, 2), u.flip(0)) if turn else (matrix, u))
    return found


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_vims_maps_are_the_rows_of_its_matrices(class_token):
    mixer = BidirectionalMixer(8, Arch(8, d_state=3)).double()
    for parameter in mixer.parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    length, token = HEIGHT * WIDTH + class_token, HEIGHT * WIDTH // 2
    x = torch.randn(length, 8, dtype=torch.float64)
    matrices = vim_matrices(mixer, x)
    # They are the mixer's: with its skips, gate and mean they give what it gives.
    skips = (mixer.D, mixer.D_b)
    y = sum(
        torch.einsum("dti,id->td", m, u) + d * u for (m, u), d in zip(matrices, skips, strict=True)
    )
    gate = (x @ mixer.in_proj.weight.mT).chunk(2, -1)[1]
    expected = (y * F.silu(gate) / 2) @ mixer.out_proj.weight.mT
    torch.testing.assert_close(mixer(x[None])[0], expected, rtol=1e-8, atol=1e-8)

    found = scan_of_sequence(mixer, x[None], (HEIGHT, WIDTH))
    patches = [i for i in range(length) if not class_token or i != token]
    for query, step in (
        ((0, 0), patches[0]),
        (QUERY, patches[QUERY[0] * WIDTH + QUERY[1]]),
        *([(None, token)] if class_token else []),
    ):
        maps = found.channel_maps(query, "contribution")
        for k, (matrix, _) in enumerate(matrices):
            row = matrix[:, step, patches].mT.unflatten(0, (HEIGHT, WIDTH))
            torch.testing.assert_close(maps[k], row, rtol=1e-8, atol=1e-12)
    # In the order of the map, the token last.
    order = [*patches, *([token] if class_token else [])]
    for k, (matrix, _) in enumerate(matrices):
        aligned = found.aligned(k, found.paths[k].matrix("contribution"))
        expected = matrix.mean(0)[order][:, order]
        torch.testing.assert_close(aligned, expected, rtol=1e-8, atol=1e-12)
        own = expected.diagonal()[: HEIGHT * WIDTH].view(HEIGHT, WIDTH)
        torch.testing.assert_close(found.diagonals("contribution")[k], own, rtol=1e-8, atol=1e-12)
    if not class_token:
        with pytest.raises(ValueError, match="no class token that could be the query"):
            found.maps(None, "qk")


def test_vims_blocks_are_captured_with_the_map_that_their_sequence_is_of():
    model = VisionMamba({"dims": 8, "depth": 3}, patch_size=8, stride=4, out_type="featmap").eval()
    found = capture(model, torch.randn(3, 24, 36))
    assert [(mixed.stage, mixed.block) for mixed in found] == [(1, 1), (1, 2), (1, 3)]
    assert {mixed.size for mixed in found} == {(5, 8)}
    assert found[0].x.shape == (1, 5 * 8 + 1, 8)
    scan = found[2].scan()
    assert (scan.height, scan.width, scan.class_token) == (5, 8, True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_without_scans_are_refused():
    with pytest.raises(ValueError, match="Conv2d has no selective scan"):
        capture(torch.nn.Conv2d(3, 3, 1), torch.zeros(3, 8, 8))


def test_queries_outside_and_unknown_kinds_are_refused():
    found = scan_of(make_mixer(), make_map())
    with pytest.raises(ValueError, match=r"\(4, 0\) lies outside of 4x5"):
        found.maps((4, 0), "qk")
    with pytest.raises(ValueError, match="choose from qk, weighted, contribution"):
        found.maps(QUERY, "w")


def test_maps_of_more_and_shorter_paths_are_drawn():
    found = scan_of(make_mixer("atrous3"), make_map())
    data = activation_maps.arrays(found, QUERY, longest=20)
    assert data["matrix_qk"].shape == (9, 4, 4)
    names = [path.name for path in found.paths]
    figure = activation_maps.draw_maps(np.zeros((8, 10, 3)), data, names, "title")
    assert len(figure.axes) == 3 * 11
    figure = activation_maps.draw_matrices(found, np.zeros((8, 10, 3)), data, "title")
    assert len(figure.axes) == 4 + 3 * 9


def test_what_is_drawn_is_the_maps():
    found = scan_of(make_mixer(), make_map())
    data = activation_maps.arrays(found, QUERY, longest=20)
    image = np.zeros((8, 10, 3))
    names = [path.name for path in found.paths]
    figure = activation_maps.draw_maps(image, data, names, "title")
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    expected = found.maps(QUERY, "weighted").abs()
    np.testing.assert_allclose(drawn[8:12], expected / expected.amax((1, 2), keepdim=True))
    (star,) = figure.axes[8].lines
    assert (star.get_xdata(), star.get_ydata()) == ([QUERY[1]], [QUERY[0]])
    figure = activation_maps.draw_matrices(found, image, data, "title")
    weighted = found.paths[1].matrix("weighted").abs()
    drawn = figure.axes[13].images[0].get_array()
    np.testing.assert_allclose(drawn, weighted / weighted.max(), rtol=1e-6)
    # Each row of matrices is named at its left end.
    named = [bool(axes.get_ylabel()) for axes in figure.axes[4:]]
    assert named == [True, False, False, False] * 3


@pytest.fixture
def run_tool(analysis_tool, tmp_path):
    """Runs the command line beside a picture; gives its exit status and output."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return analysis_tool("activation_maps")


CONFIGS = [
    "configs/sample/vmamba-sample_imagenet.py",
    "configs/sample/upernet_vmamba-sample_ade20k.py",
    "configs/sample/mask-rcnn_vmamba-sample_coco.py",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_command_line(run_tool, tmp_path, config):
    status, out = run_tool(
        config, "image.png", "--size", "64", "96", "--query", "50", "70", "--at", "2.1", "3.1"
    )
    assert status == 0
    assert "random weights" in out
    for place, shape in (("stage2_block1", (8, 12)), ("stage3_block1", (4, 6))):
        data = np.load(tmp_path / f"activation_maps/{place}.npz")
        assert data["map_weighted"].shape == (4, *shape)
        stride = 64 // shape[0]
        assert data["query"].tolist() == [50 // stride, 70 // stride]
        assert data["matrix_qk"].shape == (4, *(shape[0] * shape[1],) * 2)
        for picture in (place, f"{place}_attention"):
            assert (tmp_path / f"activation_maps/{picture}.png").stat().st_size > 10_000


def test_command_line_of_vim(run_tool, tmp_path):
    config = tmp_path / "small.py"
    config.write_text(
        '_base_ = "mmvmamba::vim/vim-tiny_8xb128_in1k.py"\n'
        "model = dict(backbone=dict(arch=dict(_delete_=True, dims=16, depth=2)))\n"
    )
    status, _ = run_tool(str(config), "image.png", "--size", "64", "96", "--class-token")
    assert status == 0
    data = np.load(tmp_path / "activation_maps/stage1_block2.npz")
    assert data["map_weighted"].shape == (2, 4, 6)
    assert data["matrix_qk"].shape == (2, 25, 25)
    assert data["query"].tolist() == []
    # The token in the middle is reached from both ends.
    for k, reached in enumerate(data["map_qk"] != 0):
        assert reached.flatten().tolist() == [(i < 12) != bool(k) for i in range(24)]
    for picture in ("stage1_block2", "stage1_block2_attention"):
        assert (tmp_path / f"activation_maps/{picture}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIGS[0], "image.png", "--class-token"], "--class-token: the model has no class token"),
        (["resnet18", "image.png"], "has no selective scan"),
        (["tiny", "nothing.png"], "no image or folder nothing.png"),
        (["tiny", "image.png", "--query", "500", "2"], "--query 500 2 lies outside of the image"),
        ([CONFIGS[0], "image.png", "--at", "9.9"], "no block 9.9; there are 1.1"),
        (["tiny", "image.png", "--checkpoint", "no.pth"], "no.pth"),
    ],
)
def test_mistakes_are_told(run_tool, arguments, message):
    status, _ = run_tool(*arguments, "--size", "64")
    assert isinstance(status, str)
    assert message in status
