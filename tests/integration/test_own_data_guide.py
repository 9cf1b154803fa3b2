"""The guides to own data, followed word by word: every block is run as it stands, in its order."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import run, run_python, scalars

# What is not as the guide says, since the real thing would take hours: lengths, and after the
# config's last line the size of model and images, whose weights the network does not have to give.
SHORTER = {
    "max_epochs = 12": "max_epochs = 1",
    "max_epochs = 20": "max_epochs = 1",
    "max_iters = 20000": "max_iters = 2",
    "epoch_12.pth": "epoch_1.pth",
    "epoch_20.pth": "epoch_1.pth",
    "iter_20000.pth": "iter_2.pth",
}
SMALLER = """
load_from = load_ignore = None
arch = dict(_delete_=True, dims=16, depths=(1, 1, 1, 1))
model.setdefault("backbone", dict())["arch"] = arch
for loader in (train_dataloader, val_dataloader):
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
default_hooks["logger"] = dict(interval=1)
"""
SMALLER_TASK = {
    "my_detector.py": """
model["neck"] = dict(in_channels=[16, 32, 64, 128], out_channels=32)
model["rpn_head"] = dict(in_channels=32, feat_channels=32)
model["roi_head"]["bbox_roi_extractor"] = dict(out_channels=32)
model["roi_head"]["bbox_head"].update(in_channels=32, fc_out_channels=32)
# An untrained detector is sure of nothing, and without boxes there are no metrics.
model["test_cfg"] = dict(rcnn=dict(score_thr=0.0))
resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
train_dataloader["dataset"]["pipeline"] = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True), resize,
    dict(type="PackDetInputs")]
val_dataloader["dataset"]["pipeline"] = [
    dict(type="LoadImageFromFile"), resize, dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=(
        "img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))]
""",
    "my_segmentor.py": """
model["data_preprocessor"]["size"] = (64, 64)
model["decode_head"].update(in_channels=[16, 32, 64, 128], channels=16)
model["auxiliary_head"].update(in_channels=64, channels=16)
train_pipeline[2]["scale"] = test_pipeline[1]["scale"] = (96, 96)
train_pipeline[3]["crop_size"] = (64, 64)
""",
    "my_classifier.py": """
model["head"].update(in_channels=128)
train_pipeline[1]["scale"] = 64
""",
}
GUIDES = ("docs/own_data.md", "docs/finetune_classifier.md")
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
METRICS = {
    "my_detector": "coco/bbox_mAP",
    "my_segmentor": "mIoU",
    "my_classifier": "accuracy/top1",
}


def scene(seed: int, colours) -> tuple[Image.Image, list[list[int]]]:
    """A picture of 96 pixels with a square of each colour, and the squares."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(90, 120, (96, 96, 3), dtype=np.uint8))
    squares = []
    for place, colour in enumerate(colours):
        left, top = 4 + 31 * place, int(random.integers(5, 60))
        squares.append([left, top, left + 24, top + 24])
        ImageDraw.Draw(image).rectangle(squares[-1], fill=colour)
    return image, squares


def write_labelme(folder: Path, labels: tuple[str, ...]) -> None:
    """Ten images, each with an object of every label: rectangles, drawn backwards, and polygons."""
    folder.mkdir()
    for seed in range(10):
        image, squares = scene(seed, COLOURS[: len(labels)])
        shapes = []
        for label, (left, top, right, bottom) in zip(labels, squares, strict=True):
            shape = {"label": label, "group_id": None, "flags": {}, "shape_type": "rectangle"}
            shape["points"] = [[right, bottom], [left, top]]
            if label == labels[-1]:
                corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
                shape |= {"shape_type": "polygon", "points": corners}
            shapes.append(shape)
        image.save(folder / f"{seed:03d}.jpg")
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
        content |= {"imagePath": f"{seed:03d}.jpg", "imageHeight": 96, "imageWidth": 96}
        (folder / f"{seed:03d}.json").write_text(json.dumps(content))


@pytest.fixture
def place(project, tmp_path) -> Path:
    """A folder where tools and configs are found, and what the guide says that the user has."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(project / name)
    write_labelme(tmp_path / "photos", ("bolt", "washer", "nut"))
    write_labelme(tmp_path / "streets", ("road", "car"))
    for name, colour in zip(("ripe", "rotten", "unripe"), COLOURS, strict=True):
        (tmp_path / "fruit" / name).mkdir(parents=True)
        for seed in range(5):
            scene(seed, [colour])[0].save(tmp_path / f"fruit/{name}/{name}{seed}.jpg")
    (tmp_path / "fruit/.ipynb_checkpoints").mkdir()
    (tmp_path / "new").mkdir()
    for name in "ab":
        scene(ord(name), COLOURS)[0].save(tmp_path / f"new/{name}.jpg")
    return tmp_path


def blocks(guide: str) -> list[tuple[str, str]]:
    """The guide's bash and python blocks: language and text."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)


def shortened(text: str) -> str:
    for real, short in SHORTER.items():
        text = text.replace(real, short)
    return text


def edit(config: Path, lines: str) -> None:
    """Replaces the config's lines of the same variables, as a user would, and shrinks it."""
    text = config.read_text()
    for line in lines.splitlines():
        variable = line.partition(" = ")[0]
        text, number = re.subn(rf"(?m)^{variable} = .*$", line, text, count=1)
        assert number == 1, f"{config.name} has no line {variable!r} to edit"
    config.write_text(text + SMALLER + SMALLER_TASK[config.name])


def test_the_guides_lead_from_images_to_predictions(project, place):
    said: dict[str, str] = {}
    for language, block in blocks("".join((project / name).read_text() for name in GUIDES)):
        text = shortened(block)
        if language == "python" and (name := re.match(r"# (my_\w+\.py)\n", text)):
            edit(place / name[1], text.partition("\n")[2])
        elif language == "python":
            found = re.search(r'"(my_\w+)\.py"', text)[1]
            said[f"infer {found}"] = run_python("-c", text, cwd=place).stdout
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                if program == "python":
                    done = run_python(*arguments, cwd=place)
                    tool, what = Path(arguments[0]).stem, Path(arguments[1]).stem
                    said[f"{tool} {what}"] = done.stdout
                else:
                    run(program, *arguments, cwd=place)
    # As the guide shows it.
    assert re.search(r"bolt +8 +2\s+nut +8 +2\s+washer +8 +2\s", said["prepare_dataset boxes"])
    assert 'classes = ["bolt", "nut", "washer"]' in said["prepare_dataset boxes"]
    assert 'classes = ["background", "road", "car"]' in said["prepare_dataset masks"]
    assert 'image_suffix = ".jpg"' in said["prepare_dataset masks"]
    assert 'classes = ["ripe", "rotten", "unripe"]' in said["prepare_dataset images"]
    for config, metric in METRICS.items():
        report = said[f"check_dataset {config}"]
        assert "Nothing is refused." in report
        assert (place / f"work_dirs/{config}/data/samples.png").is_file()
        assert metric in scalars(place / "work_dirs" / config)[-1]
        assert metric in said[f"test {config}"]
        shown = list((place / "pictures" / config[3:]).rglob("*.[jp][pn]g"))
        assert len(shown) == (3 if config == "my_classifier" else 2)
    counts = r"bolt +{0} +█+\s+nut +{0} +█+\s+washer +{0} "
    report = said["check_dataset my_detector"]
    assert re.search(r"train: 8 images\s[\s─]*class +objects[\s─]+" + counts.format(8), report)
    assert re.search(
        r"val and test: 2 images\s[\s─]*class +objects[\s─]+" + counts.format(2), report
    )
    # 25 pixels a side, with the edges.
    assert re.search(rf"road +{8 * 625} .*\s+car +{8 * 625} ", said["check_dataset my_segmentor"])
    report = said["check_dataset my_classifier"]
    assert re.search(r"ripe +4 +█+\s+rotten +4 +█+\s+unripe +4 ", report)
    for folder in ("predicted", "segmented", "classified"):
        assert len(list((place / folder).glob("*.png"))) == 2
    assert len(list((place / "detected/vis").iterdir())) == 2
    assert len(json.loads((place / "detected/preds/a.json").read_text())["scores"]) > 0
    assert np.asarray(Image.open(place / "maps/pred/00000000_pred.png")).max() <= 2
    assert re.search(r"new/b\.jpg (ripe|rotten|unripe) 0\.\d+", said["infer my_classifier"])
