"""Images that are no photographs: every tool takes as many channels as the model does."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mmvmamba import compat
from mmvmamba.analysis.activations import count_activations
from mmvmamba.analysis.flops import count_config
from mmvmamba.analysis.inspection import image_reader, read_image, shown
from mmvmamba.analysis.measured import image_channels
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.pictures import as_picture, predict_and_draw, training_samples
from mmvmamba.analysis.scale_up import Study, measure_cost
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.analysis.throughput import measure_case
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.tasks import enable_drawing
from mmvmamba.models import VMamba
from mmvmamba.registry import MODELS

BANDS = 13
SEGMENTOR = """
default_scope = "mmseg"
bands = {bands}
root = {root!r}
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[2000.0] * bands, std=[500.0] * bands, size=(32, 32)
    ),
    backbone=dict(
        type="mmvmamba.VMamba", arch=dict(dims=8, depths=(1, 1)), in_channels=bands,
    ),
    decode_head=dict(
        type="FCNHead", in_channels=16, in_index=1, channels=8, num_convs=1, num_classes=2,
        norm_cfg=dict(type="BN"),
    ),
    test_cfg=dict(mode="whole"),
)
load = dict(
    type="LoadImageFromFile", color_type="unchanged", imdecode_backend="tifffile", to_float32=True
)
dataset = dict(
    type="BaseSegDataset", data_root=root, metainfo=dict(classes=["a", "b"]), img_suffix=".tif",
    data_prefix=dict(img_path="images", seg_map_path="masks"),
    pipeline=[load, dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
)
train_dataloader = dict(batch_size=2, dataset=dataset)
both = dict(type="ConcatDataset", datasets=[dataset, dataset])
test_dataloader = dict(batch_size=1, dataset=both)
visualizer = dict(type="SegLocalVisualizer")
"""
CLASSIFIER = """
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="mmvmamba.VMamba", arch=dict(dims=8, depths=(1,)), in_channels=4, out_indices=(0,),
        outnorm=False,
    ),
    head=dict(type="mmvmamba.VMambaClsHead", num_classes=3, in_channels=8),
)
"""


@pytest.fixture
def segmentor(tmp_path):
    """A config of images with 13 bands of 16 bits, its two images and its weights."""
    if compat.stack() is compat.ONEDL:
        pytest.skip("OneDL's segmentors normalise images of one or three channels alone")
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        image = rng.integers(500, 4000, (32, 40, BANDS), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"data/images/{name}.tif", image)
        Image.fromarray(np.eye(32, 40, dtype=np.uint8)).save(tmp_path / f"data/masks/{name}.png")
    file = tmp_path / "mine.py"
    file.write_text(SEGMENTOR.format(bands=BANDS, root=str(tmp_path / "data")))
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(file)).model | {"_scope_": "mmseg"})
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return file


@pytest.fixture
def classifier(tmp_path):
    file = tmp_path / "classifier.py"
    file.write_text(CLASSIFIER)
    return file


def test_channels_are_those_of_the_first_convolution(segmentor):
    for channels in (1, 4):
        assert image_channels(VMamba({"dims": 8, "depths": (1,)}, in_channels=channels)) == channels
    assert image_channels(find_subject(str(segmentor)).build((32, 32))) == BANDS
    assert image_channels(torch.nn.Linear(2, 2)) == 3


def test_flops(segmentor):
    counted = count_config(load_config(str(segmentor)), (64, 64))
    photographs = load_config(
        str(segmentor), {"bands": 3} | {"model.data_preprocessor.size": (64, 64)}
    )
    fewer = count_config(photographs, (64, 64))
    # Three by three, to four channels, at stride two.
    assert counted.params - fewer.params == (BANDS - 3) * 9 * 4
    assert counted.flops - fewer.flops == (BANDS - 3) * 9 * 4 * 32 * 32


def test_upstreams_drawing_is_refused_with_what_draws(segmentor):
    cfg = load_config(str(segmentor))
    with pytest.raises(UsageError, match=r"13 channels.*visualize\.py"):
        enable_drawing(cfg, "pictures", show=False, wait_time=0)


def test_times_and_activations(segmentor, classifier):
    device = torch.device("cpu")
    for config in (segmentor, classifier):
        subject = find_subject(str(config))
        for passes in ("inference", "training"):
            case = Case(passes, "fp32", 2, (32, 32))
            (result,) = measure_case([subject], case, device, 0, rounds=1)
            assert result.failure == ""
            assert result.images_per_second > 0
        found = count_activations(subject, case, "cpu")
        assert found.failure == ""
        assert found.bytes > 0


def test_costs_of_scaling_up(classifier, tmp_path):
    study = Study(str(classifier), "weights.pth", tmp_path, batches=(1, 1), seconds=0)
    found = measure_cost(study, 32)
    assert found["failure"] == ""
    assert found["images_per_second"] > 0


def test_fields_and_maps(segmentor, analysis_tool, tmp_path):
    images = tmp_path / "data/images"
    erf = analysis_tool("erf")
    status, _ = erf(str(segmentor), "--size", "32", "--images", str(images), "--out", "a.png")
    assert status == 0
    field = np.load("a.npz")["fields"]
    status, _ = erf(str(segmentor), "--size", "32", "--num", "1", "--out", "b.png")
    assert status == 0
    assert field.shape == np.load("b.npz")["fields"].shape == (1, 32, 32)
    assert field.sum() > 0
    maps = analysis_tool("activation_maps")
    status, out = maps(
        str(segmentor), str(images / "one.tif"), "--size", "32", "--checkpoint",
        str(tmp_path / "weights.pth"), "--out", "maps",
    )  # fmt: skip
    assert status == 0
    assert "stage 2, block 1" in out
    assert len(list((tmp_path / "maps").glob("*.npz"))) == 2


def test_images_are_loaded_and_normalised_as_the_config_says(segmentor, tmp_path):
    path = tmp_path / "data/images/one.tif"
    model = VMamba({"dims": 8, "depths": (1,)}, in_channels=BANDS)
    image = image_reader(model, str(segmentor), (32, 40))(path)
    expected = (tifffile.imread(path).astype(np.float32) - 2000) / 500
    np.testing.assert_allclose(image, expected.transpose(2, 0, 1), atol=1e-4)
    assert image_reader(model, str(segmentor), (16, 48))(path).shape == (BANDS, 16, 48)
    # Without a config, each channel has mean 0 and variance 1.
    image = image_reader(model, "tiny", (32, 40))(path)
    torch.testing.assert_close(image.mean((1, 2)), torch.zeros(BANDS), atol=1e-4, rtol=0)
    assert 0 <= shown(image).min() <= shown(image).max() <= 1
    gray = tmp_path / "gray.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(gray)
    assert read_image(gray, (8, 8), channels=1).shape == (1, 8, 8)
    with pytest.raises(UsageError, match=r"one\.tif has 13 channels as it is loaded, .* takes 4"):
        read_image(path, (8, 8), channels=4)
    (tmp_path / "no.tif").write_text("no picture")
    with pytest.raises(UsageError, match=r"no\.tif cannot be read"):
        read_image(tmp_path / "no.tif", (8, 8), channels=4)


def test_training_data_and_predictions_are_drawn(segmentor, tmp_path):
    cfg = load_config(str(segmentor))
    samples = list(training_samples(cfg))
    assert [path.stem for path, *_ in samples] == ["one", "two"]
    raw = tifffile.imread(samples[0][0])[..., :3].astype(np.float32)
    expected = (raw - raw.min()) / (raw.max() - raw.min()) * 255
    np.testing.assert_allclose(samples[0][1], expected, atol=1)
    assert (samples[0][2] != samples[0][1]).any()
    pairs = list(predict_and_draw(cfg, str(tmp_path / "weights.pth")))
    # The test data set is wrapped, and has both images twice.
    assert [pair.path.stem for pair in pairs] == ["one", "two", "one", "two"]
    np.testing.assert_array_equal(pairs[0].image, samples[0][1])
    own = [tmp_path / "data/images/two.tif"]
    (pair,) = predict_and_draw(cfg, str(tmp_path / "weights.pth"), own)
    np.testing.assert_array_equal(pair.truth, pairs[1].truth)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_photographs_are_as_they_are(dtype):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(as_picture(image.astype(dtype)), image[..., ::-1])
    np.testing.assert_array_equal(as_picture(image.astype(dtype), rgb=True), image)
    if dtype is np.float32:
        np.testing.assert_array_equal(as_picture(image / np.float32(255)), image[..., ::-1])
        # Augmentations go beyond black and white.
        np.testing.assert_array_equal(
            as_picture(image * np.float32(1.5) - 40),
            (image * 1.5 - 40).round().clip(0, 255)[..., ::-1],
        )


def test_other_channels_are_drawn_too():
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(as_picture(image), image[..., :3])
    for gray in (image[..., 0], image[..., :1], image[..., :2]):
        np.testing.assert_array_equal(as_picture(gray), image[..., [0, 0, 0]])
