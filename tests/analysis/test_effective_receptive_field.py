"""Effective receptive fields: of layers whose fields are known, measured and drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmvmamba.analysis.effective_receptive_field import (
    Area,
    draw_fields,
    effective_receptive_field,
    smallest_square,
)
from mmvmamba.analysis.inspection import build_backbone, find_images, read_image, shown
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.checkpoint import CheckpointError

CONFIG = "configs/sample/vmamba-sample_imagenet.py"


def box_filters(layers):
    """Convolutions that each add nine neighbours and three colours, and halve the sign."""
    convs = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(layers)]
    for conv in convs:
        nn.init.ones_(conv.weight)
    return nn.Sequential(*convs)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_of_box_filters_it_is_their_convolution(layers):
    images = torch.rand(2, 3, 15, 17)
    found = effective_receptive_field(box_filters(layers), images)
    line = np.ones(1)
    for _ in range(layers):
        line = np.convolve(line, np.ones(3))
    expected = np.zeros((15, 17))
    rows, columns = slice(7 - layers, 8 + layers), slice(8 - layers, 9 + layers)
    # Three colours in, three channels out, and three channels between each two layers.
    expected[rows, columns] = np.outer(line, line) * 9 * 3 ** (layers - 1)
    np.testing.assert_allclose(found, expected)


def test_negative_activations_and_gradients_do_not_count():
    class Signs(nn.Module):
        def forward(self, images):
            # Channels: positive, from colour 0; positive, against colour 1; negative.
            a, b, c = images.unbind(1)
            return torch.stack([2 * a, 5 - b, -3 * c], 1)

    images = torch.ones(3, 3, 5, 5)
    expected = np.zeros((5, 5))
    expected[2, 2] = 2
    np.testing.assert_array_equal(effective_receptive_field(Signs(), images), expected)


def test_it_is_the_mean_over_images():
    class Square(nn.Module):
        def forward(self, images):
            return images**2

    images = torch.stack([torch.full((3, 3, 3), value) for value in (1.0, 2.0)])
    found = effective_receptive_field(Square(), images)
    # The derivative is 2x, over three colours: the mean of 6 and 12.
    assert found[1, 1] == 9
    assert found.sum() == 9


def test_the_last_map_counts_and_its_format_is_respected():
    class Two(nn.Module):
        output_fmt = "NHWC"

        def forward(self, images):
            return [images * 0, images.permute(0, 2, 3, 1)]

    found = effective_receptive_field(Two(), torch.ones(1, 3, 4, 6))
    assert np.argwhere(found).tolist() == [[2, 3]]


def test_what_has_no_field_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        effective_receptive_field(nn.Identity(), [])
    with pytest.raises(ValueError, match=r"has shape \(1, 27\), and is no map"):
        effective_receptive_field(nn.Flatten(), torch.ones(1, 3, 3, 3))
    with pytest.raises(ValueError, match="is zero or not finite"):
        effective_receptive_field(nn.ReLU(), -torch.ones(1, 3, 3, 3))


def test_squares_of_a_known_field():
    field = np.zeros((11, 11))
    for reach, value in ((3, 1.0), (1, 4.0)):
        field[5 - reach : 6 + reach, 5 - reach : 6 + reach] = value
    # 9 pixels of 4 and 40 of 1: 36 of 76 inside of the inner square.
    assert smallest_square(field, 0.05) == Area(0.05, 1, 1 / 121)
    assert smallest_square(field, 0.47) == Area(0.47, 3, 9 / 121)
    assert smallest_square(field, 0.48) == Area(0.48, 5, 25 / 121)
    assert smallest_square(field, 0.99) == Area(0.99, 7, 49 / 121)


@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (6, 16)])
def test_a_uniform_field_needs_nearly_all(shape):
    area = smallest_square(np.ones(shape), 0.999)
    assert area.ratio == 1
    assert area.side == max(shape)


def test_vmamba_sees_everything_and_a_convolutional_network_does_not():
    def ratio(name):
        model = build_backbone(name, (256, 256))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, 3, 256, 256, generator=generator)
        return (effective_receptive_field(model, images) > 0).mean()

    assert ratio(CONFIG) > 0.3
    assert ratio("resnet18") < ratio(CONFIG)


def test_seeds_make_weights_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (
        next(build_backbone(CONFIG, (64, 64), seed=seed).parameters()) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", [CONFIG, "resnet18", "deit_tiny_patch16_224"])
def test_weights_of_a_whole_model_are_loaded(name, tmp_path):
    import timm

    size = (64, 64)
    if name == CONFIG:
        state = build_backbone(name, size, seed=3).state_dict()
        state = {f"backbone.{key}": value for key, value in state.items()}
        state |= {"head.fc.weight": torch.zeros(2, 2)}
    else:
        torch.manual_seed(3)
        state = timm.create_model(name).state_dict()
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    loaded = build_backbone(name, size, str(tmp_path / "weights.pth"))
    found = {
        key.rpartition("model.")[2].replace("_", "."): v for key, v in loaded.named_parameters()
    }
    expected = {key.removeprefix("backbone.").replace("_", "."): v for key, v in state.items()}
    # The position embedding is made for the images' size.
    assert all(torch.equal(v, expected[k]) for k, v in found.items() if k != "pos.embed")
    assert len(found) > 50
    del state[next(iter(state))]
    torch.save({"state_dict": state}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"less\.pth"):
        build_backbone(name, size, str(tmp_path / "less.pth"))


def test_pictures_are_scaled_cut_and_normalised(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = (255, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (path,) = find_images([tmp_path])
    image = read_image(path, (20, 20))
    assert image.shape == (3, 20, 20)
    np.testing.assert_allclose(shown(image), pixels[:, 10:30] / 255, atol=1e-6)
    assert read_image(path, (30, 16)).shape == (3, 30, 16)
    (tmp_path / "b.png").write_text("no picture")
    assert len(find_images([tmp_path])) == 2
    assert find_images([tmp_path], limit=1) == [path]
    with pytest.raises(UsageError, match=r"b\.png cannot be read as a picture"):
        read_image(tmp_path / "b.png", (8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no picture"):
        find_images([tmp_path / "empty"])


def test_fields_are_drawn_in_rows_and_columns():
    one, two = np.eye(4), np.ones((4, 4))
    figure = draw_fields({"before": [("a", one), ("b", two)], "after": [("b", 3 * one)]}, "title")
    shown_axes = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown_axes] == ["a\nbefore", "b\nbefore", "b\nafter"]
    np.testing.assert_array_equal(shown_axes[2].images[0].get_array(), one)


@pytest.fixture
def run_tool(analysis_tool):
    """Runs the command line; gives its exit status and output."""
    return analysis_tool("erf", columns=200)


def test_command_line(run_tool, tmp_path):
    backbone = build_backbone(CONFIG, (64, 96), seed=7)
    torch.save({"state_dict": backbone.state_dict()}, tmp_path / "w.pth")
    status, out = run_tool(
        f"{CONFIG}=w.pth", "resnet18", "--size", "64", "96", "--num", "2", "--seeds", "2",
        "--thresholds", "0.3", "0.9", "--out", "new/erf.png",
    )  # fmt: skip
    assert status == 0
    data = np.load(tmp_path / "new/erf.npz")
    name = "vmamba-sample_imagenet"
    assert data["models"].tolist() == [name, "resnet18", name]
    assert data["states"].tolist() == ["before training"] * 2 + ["after training"]
    assert data["fields"].shape == (3, 64, 96)
    for i, j in np.ndindex(3, 2):
        area = smallest_square(data["fields"][i], data["thresholds"][j])
        assert (data["sides"][i, j], data["ratios"][i, j]) == (area.side, area.ratio)
        assert f"{area.side}, {area.ratio:.1%}" in out
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    expected = effective_receptive_field(backbone, images)
    np.testing.assert_allclose(data["fields"][2], expected, rtol=1e-5)
    of_seeds = [
        effective_receptive_field(build_backbone(CONFIG, (64, 96), seed=seed), images)
        for seed in range(2)
    ]
    np.testing.assert_allclose(data["fields"][0], np.mean(of_seeds, axis=0), rtol=1e-5)
    assert (tmp_path / "new/erf.png").stat().st_size > 10_000


def test_command_line_on_pictures(run_tool, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.jpg")
    status, _ = run_tool(CONFIG, "--size", "64", "--images", ".")
    assert status == 0
    field = np.load(tmp_path / "erf.npz")["fields"][0]
    image = read_image(tmp_path / "picture.jpg", (64, 64))
    expected = effective_receptive_field(build_backbone(CONFIG, (64, 64)), [image])
    np.testing.assert_allclose(field, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swin_tin"], "Did you mean"),
        ([f"{CONFIG}=nothing.pth"], "nothing.pth"),
        ([CONFIG, "--images", "nowhere"], "no image or folder nowhere"),
    ],
)
def test_mistakes_are_told(run_tool, arguments, message):
    status, _ = run_tool(*arguments, "--size", "64")
    assert isinstance(status, str)
    assert message in status


def test_several_checkpoints_of_a_model_are_rows(load_tool):
    tool = load_tool("erf")
    found = [
        tuple(run) for run in tool.runs(["tiny=epoch_1.pth", "tiny=epoch_2.pth", "a.py=b.pth"])
    ]
    assert found == [
        ("tiny", "tiny", None, "before training"),
        ("a", "a.py", None, "before training"),
        ("tiny", "tiny", "epoch_1.pth", "epoch_1"),
        ("tiny", "tiny", "epoch_2.pth", "epoch_2"),
        ("a", "a.py", "b.pth", "after training"),
    ]


@pytest.mark.parametrize(("number", "models"), [("6", 6), ("13", 8), ("14", 3)])
def test_a_figure_of_the_paper_is_its_models(load_tool, number, models):
    """Six systems, eight scan patterns, three initialisations, each of which can be found."""
    tool = load_tool("erf")
    options = tool.parse_arguments(["--figure", number, "tiny=a.pth"])
    assert len(set(options.models[:-1])) == models
    for name in options.models[:-1]:
        find_subject(name, backbone_only=True)
    *before, after = tool.runs(options.models)
    assert len(before) == models
    assert (after.model, after.checkpoint) == ("tiny", "a.pth")
