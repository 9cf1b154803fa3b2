"""Predictions beside the ground truth, for each task, and what data sets give to models."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import run_python

from mmvmamba.analysis.inspection import find_images
from mmvmamba.analysis.pictures import predict_and_draw, training_samples
from mmvmamba.engine.cli import load_config, load_config_and_data
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.checkpoint import CheckpointError

# Half of the lines that frame boxes and masks, and a pixel of smoothing.
LINE = 5
IMAGES = {
    "mmdet": "coco/val2017",
    "mmseg": "ADEChallengeData2016/images/validation",
    "mmpretrain": "imagenet/val",
}


def pairs(trained, *options, **settings):
    return list(
        predict_and_draw(
            load_config(str(trained.config)), str(trained.checkpoint), *options, **settings
        )
    )


def changed(drawn, image):
    return (drawn != image).any(axis=-1)


@pytest.fixture
def without_text(monkeypatch):
    """Leaves out labels, which stand beside and above what they name."""
    from mmdet.visualization import DetLocalVisualizer

    monkeypatch.setattr(DetLocalVisualizer, "draw_texts", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(cv2, "rectangle", lambda image, *args: image)
    monkeypatch.setattr(cv2, "putText", lambda image, *args: image)


def region(shape, instances):
    """Where boxes, filled, and masks of instances are."""
    found = np.zeros(shape, np.uint8)
    boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
    for left, top, right, bottom in boxes.numpy().round().astype(int).tolist():
        found[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = 1
    masks = instances.masks
    masks = masks.to_ndarray() if hasattr(masks, "to_ndarray") else masks.numpy()
    return found | masks.any(axis=0).astype(np.uint8) if len(masks) else found


def test_boxes_and_masks_are_drawn_where_they_are(train_once, without_text):
    found = pairs(train_once("mmdet"), score_threshold=2.0)
    assert len(found) == 2
    for pair in found:
        # No instance is scored above 2, so nothing is drawn.
        np.testing.assert_array_equal(pair.prediction, pair.image)
        np.testing.assert_array_equal(pair.image, np.asarray(Image.open(pair.path).convert("RGB")))
        truth = pair.sample.gt_instances
        assert len(truth) > 0
        inside = region(pair.image.shape[:2], truth)
        difference = changed(pair.truth, pair.image)
        near = cv2.dilate(inside, np.ones((2 * LINE + 1, 2 * LINE + 1), np.uint8)).astype(bool)
        assert not (difference & ~near).any()
        masks = truth.masks.to_ndarray().any(axis=0)
        assert difference[masks].mean() > 0.95


def test_as_many_instances_are_drawn_as_are_scored_above_the_threshold(train_once, monkeypatch):
    from mmdet.visualization import DetLocalVisualizer

    drawn = []
    real = DetLocalVisualizer._draw_instances

    def draw(self, image, instances, *rest):
        if "scores" in instances:
            drawn.append(len(instances))
        return real(self, image, instances, *rest)

    monkeypatch.setattr(DetLocalVisualizer, "_draw_instances", draw)
    trained = train_once("mmdet")
    scores = [pair.sample.pred_instances.scores for pair in pairs(trained, score_threshold=2.0)]
    threshold = float(np.median(np.concatenate(scores)))
    expected = [int((one > threshold).sum()) for one in scores]
    assert sum(expected) > 0
    drawn.clear()
    found = pairs(trained, score_threshold=threshold)
    assert drawn == expected
    for pair, count in zip(found, expected, strict=True):
        assert changed(pair.prediction, pair.image).any() == (count > 0)


def test_maps_are_blended_with_their_colours(train_once, without_text):
    trained = train_once("mmseg")
    alpha = load_config(str(trained.config)).visualizer.get("alpha", 0.8)
    from mmseg.datasets import ADE20KDataset

    palette = np.array(ADE20KDataset.METAINFO["palette"])
    for pair in pairs(trained):
        for drawn, labels in (
            (pair.prediction, pair.sample.pred_sem_seg.data[0].numpy()),
            (pair.truth, pair.sample.gt_sem_seg.data[0].numpy()),
        ):
            known = labels < len(palette)
            colours = np.where(known[..., None], palette[np.where(known, labels, 0)], 0)
            expected = (pair.image * (1 - alpha) + colours * alpha).astype(np.uint8)
            np.testing.assert_array_equal(drawn, expected)


def test_own_images_are_drawn_without_a_ground_truth(trained, sample_data, tmp_path):
    known = find_images([sample_data / IMAGES[trained.task.name]])[0]
    own = tmp_path / f"own{known.suffix}"
    shutil.copy(known, own)
    first, second = pairs(trained, [known, own])
    assert (first.path, second.path) == (known, own)
    np.testing.assert_array_equal(first.image, second.image)
    assert changed(first.truth, first.image).any()
    np.testing.assert_array_equal(second.truth, second.image)
    # Both are predicted on alike.
    np.testing.assert_array_equal(first.prediction, second.prediction)


def test_own_images_need_no_data_set(train_once, sample_data):
    trained = train_once("mmseg")
    cfg = load_config_and_data(str(trained.config), data_root="/nowhere")
    images = find_images([sample_data / IMAGES["mmseg"]], limit=1)
    [pair] = predict_and_draw(cfg, str(trained.checkpoint), images)
    assert changed(pair.prediction, pair.image).mean() > 0.5
    with pytest.raises(UsageError, match="/nowhere does not exist"):
        next(predict_and_draw(cfg, str(trained.checkpoint)))


def test_weights_that_do_not_fit_are_refused(train_once):
    with pytest.raises(CheckpointError, match="does not fit"):
        next(
            predict_and_draw(
                load_config(str(train_once("mmseg").config)), str(train_once("mmdet").checkpoint)
            )
        )


def test_the_pipelines_images_are_drawn_with_their_annotations(trained, without_text):
    cfg = load_config(str(trained.config))
    found = list(training_samples(cfg, limit=3))
    assert len(found) == 3
    for path, image, annotated in found:
        assert path.is_file()
        assert image.dtype == annotated.dtype == np.uint8
        assert image.shape == annotated.shape
        assert changed(annotated, image).any()


def test_the_pipelines_images_are_in_the_files_colours(train_once):
    cfg = load_config(str(train_once("mmdet").config))
    path, image, _ = next(training_samples(cfg))
    # The pipeline changes the size, and may flip.
    original = Image.open(path).convert("RGB").resize(image.shape[1::-1])
    means = image.mean(axis=(0, 1)), np.asarray(original).mean(axis=(0, 1))
    np.testing.assert_allclose(*means, atol=2)
    assert np.ptp(means[0]) > 4


def test_a_config_without_training_data_is_refused(trained):
    cfg = load_config(str(trained.config))
    cfg.train_dataloader = None
    with pytest.raises(UsageError, match="no train_dataloader"):
        next(training_samples(cfg))


def test_the_command_lines_write_both_halves(train_once, project, tmp_path):
    trained = train_once("mmdet")
    tool = project / "tools/analysis_tools/visualize.py"
    arguments = ("--num", "1", "--score-thr", "2", "--out-dir", "out", "--sheet", "new/sheet.png")
    run_python(tool, trained.config, trained.checkpoint, *arguments, cwd=tmp_path)
    [picture] = (tmp_path / "out").glob("*.png")
    left, right = np.split(np.asarray(Image.open(picture)), 2, axis=1)
    [pair] = pairs(trained, limit=1, score_threshold=2.0)
    # The colours of masks are drawn at random around their class's.
    drawn = changed(pair.truth, pair.image)
    assert changed(left, pair.image)[drawn].mean() > 0.98
    np.testing.assert_array_equal(left[~drawn], pair.image[~drawn])
    np.testing.assert_array_equal(right, pair.image)
    assert Image.open(tmp_path / "new/sheet.png").size > (100, 100)

    tool = project / "tools/analysis_tools/browse_dataset.py"
    run_python(tool, trained.config, "--num", "2", "--out-dir", "train", cwd=tmp_path)
    assert len(list((tmp_path / "train").glob("*.png"))) == 2


def test_mistakes_end_with_one_message(project, tmp_path):
    tool = project / "tools/analysis_tools/visualize.py"
    done = run_python(tool, "configs/nothing.py", "weights.pth", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "error: no config configs/nothing.py" in done.stdout
    assert "Traceback" not in done.stdout
