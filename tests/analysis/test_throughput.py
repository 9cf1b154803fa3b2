"""Throughput: the right models in the right modes, checked, timed in turns and reported."""

import csv
import dataclasses
import io
import itertools
import re
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from mmvmamba.analysis import passes, reports, throughput
from mmvmamba.analysis.measured import PEERS, Ranked, Subject, silence
from mmvmamba.analysis.passes import Case
from mmvmamba.analysis.subjects import build_classifier, find_subject
from mmvmamba.analysis.throughput import Result, measure_case
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError
from mmvmamba.models import VMamba

CPU = torch.device("cpu")


class Small(nn.Module):
    """A classifier of five classes; what it does when it is called is given."""

    def __init__(self, change=lambda logits: logits):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.change = change

    def forward(self, images):
        return self.change(self.head(self.drop(self.conv(images).relu().mean((2, 3)))))


def small(name="small", **kwargs):
    return Subject(name, lambda size: Small(**kwargs), classifies=True)


def measure_one(subject, case, rounds=1):
    (result,) = measure_case([subject], case, CPU, seconds=0, rounds=rounds)
    return result


def test_our_classifier_is_the_official_one_in_size():
    with torch.device("meta"):
        model = build_classifier("tiny-s1l8")
    assert sum(p.numel() for p in model.parameters()) == 30249064


def test_checkpointing_is_part_of_a_name():
    blocks = find_subject("tiny+cp").build((32, 32))[0].layers[0].blocks
    assert blocks[0].with_cp
    assert not find_subject("tiny").build((32, 32))[0].layers[0].blocks[0].with_cp


@pytest.mark.parametrize(
    ("name", "near"),
    [("swin_tiny", "swin-tiny"), ("tiny-s1l9", "tiny-s1l8"), ("resnet5", "resnet")],
)
def test_an_unknown_model_gets_the_nearest_names(name, near):
    with pytest.raises(ValueError, match=f"'{name}' is neither .*Did you mean [^?]*{near}"):
        find_subject(name)


@pytest.mark.parametrize("name", list(PEERS))
def test_peers_exist(name):
    library, target = PEERS[name]
    if library == "timm":
        import timm

        assert timm.is_model(target)
        find_subject(name)
    else:
        backbone = load_config(f"{library}::{target}").model.backbone
        kinds = {"nat": "NAT", "s4nd": "S4ND", "vim": "VisionMamba", "hivit": "HiViT"}
        assert backbone.type.rpartition(".")[2].startswith(kinds[name.partition("-")[0]])


@pytest.mark.parametrize("name", ["deit-tiny", "swin-tiny", "resnet18"])
def test_peers_are_made_for_the_images_size(name):
    with torch.no_grad():
        assert find_subject(name).build((32, 64)).eval()(torch.zeros(1, 3, 32, 64)).shape == (
            1,
            1000,
        )


def test_an_mmpretrain_peer_with_and_without_head():
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert find_subject("hivit-tiny").build((64, 64)).eval()(images).shape == (1, 1000)
        (map_,) = find_subject("hivit-tiny", backbone_only=True).build((64, 64))(images)
    assert map_.shape == (1, 384, 4, 4)


@pytest.mark.parametrize("name", ["nat-tiny", "s4nd-convnext-tiny", "vim-tiny"])
def test_a_compared_system_with_and_without_head(name):
    images = torch.zeros(1, 3, 64, 32)
    with torch.no_grad():
        assert find_subject(name).build((64, 32)).eval()(images).shape == (1, 1000)
        (map_,) = find_subject(name, backbone_only=True).build((64, 32)).eval()(images)
    assert map_.shape[2:] == ((4, 2) if name == "vim-tiny" else (2, 1))
    if name != "vim-tiny":
        # It has passed a norm, which takes the mean away; Vim's does not.
        assert map_.mean(1).abs().max() < 1e-4


@pytest.mark.parametrize("precision", passes.PRECISIONS)
@pytest.mark.parametrize("pass_", passes.PASSES)
def test_every_mode_is_checked_and_timed(pass_, precision):
    result = measure_one(small(), Case(pass_, precision, 2, (16, 24)), rounds=3)
    assert not result.failure
    assert result.calls == 3
    assert result.p20 <= result.seconds <= result.p80
    assert result.images_per_second == pytest.approx(2 / result.seconds)
    assert result.params == sum(p.numel() for p in Small().parameters())
    assert (result.error == 0) == (precision == "fp32")
    assert result.peak_gb is None


@pytest.mark.parametrize("pass_", passes.PASSES)
def test_vmamba_is_measured(pass_):
    result = measure_one(find_subject("tiny"), Case(pass_, "autocast-bf16", 1, (32, 32)))
    assert not result.failure
    assert 0 < result.error < 0.05
    assert result.params == 30249064


@pytest.mark.parametrize(
    ("config", "is_ranked"),
    [
        ("vmamba-sample_imagenet", False),
        ("upernet_vmamba-sample_ade20k", False),
        ("mask-rcnn_vmamba-sample_coco", True),
    ],
)
def test_configs_are_measured(config, is_ranked):
    subject = find_subject(f"configs/sample/{config}.py")
    result = measure_one(subject, Case("training", "fp32", 2, (64, 96)))
    assert (result.failure, result.model) == ("", config)
    model = subject.build((64, 96)).eval()
    with torch.no_grad():
        assert isinstance(model(torch.zeros(1, 3, 64, 96)), Ranked) == is_ranked


def test_the_backbone_of_a_config():
    name = "configs/sample/mask-rcnn_vmamba-sample_coco.py"
    subject = find_subject(name, True, {"model.backbone.with_cp": True})
    backbone = subject.build((64, 64))
    assert type(backbone).__name__ == "VMamba"
    assert backbone.layers[0].blocks[0].with_cp
    assert not measure_one(subject, Case("training", "bf16", 1, (64, 64))).failure


def test_a_compiled_model_is_measured(monkeypatch):
    compiled = []

    def note(model, options):
        compiled.append(options)
        return model

    monkeypatch.setattr(torch, "compile", note)
    ours = Subject("ours", lambda _: nn.Sequential(VMamba({"dims": 8, "depths": [1]})))
    for execution in ("compiled", "compiled+frozen"):
        for subject in (ours, small()):
            result = measure_one(subject, Case("inference", "fp32", 1, (16, 16), execution))
            assert not result.failure
    # Others keep Inductor's layout pass, which is good for them.
    layout, frozen = {"layout_optimization": False}, {"freezing": True}
    assert compiled == [layout, {}, layout | frozen, frozen]


def test_constant_weights_do_not_train():
    with pytest.raises(ValueError, match="cannot train: give --passes inference"):
        measure_case([small()], Case("training", "fp32", 1, (8, 8), "compiled+frozen"), CPU, 0)


@pytest.mark.parametrize("name", list(passes.MEMORY_FORMATS))
def test_the_memory_format_is_the_images_and_the_weights(name):
    seen = []

    class Noting(nn.Conv2d):
        def forward(self, images):
            seen.extend((images, self.weight))
            return super().forward(images)

    subject = Subject("noting", lambda size: Noting(3, 4, 3))
    case = Case("inference", "fp32", 2, (16, 16), memory_format=name)
    assert not measure_one(subject, case).failure
    format_ = passes.MEMORY_FORMATS[name]
    assert all(tensor.is_contiguous(memory_format=format_) for tensor in seen)


def bf16_is_wrong(logits):
    return logits if logits.dtype == torch.float32 else logits * 1.2


def bf16_is_nan(logits):
    return logits if logits.dtype == torch.float32 else logits * float("nan")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.dtype == torch.float32 else -grad


def bf16_has_another_shape(logits):
    return logits if logits.dtype == torch.float32 else logits[:, :1]


def out_of_memory(logits):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


@pytest.mark.parametrize(
    ("change", "pass_", "reason"),
    [
        (bf16_is_wrong, "inference", r"the output is 2\.\de-01 away .*allowed is 5e-02"),
        (bf16_is_nan, "inference", "the output is not finite"),
        (WrongGradient.apply, "training", r"the gradients are 2\.0e\+00 away"),
        (lambda logits: logits.detach(), "training", "no output has a gradient"),
        (bf16_has_another_shape, "inference", "1 tensors in this mode, 1 in fp32, or of other sh"),
        (out_of_memory, "inference", "out of memory"),
    ],
)
def test_what_fails_has_a_reason_and_no_figures(change, pass_, reason):
    bad, good = small("bad", change=change), small("good")
    case = Case(pass_, "bf16", 2, (16, 16))
    failed, timed = measure_case([bad, good], case, CPU, seconds=0, rounds=1)
    assert re.match(reason, failed.failure)
    assert failed.seconds is failed.images_per_second is failed.error is None
    assert timed.seconds > 0
    table = reports.throughput_table([failed, timed])
    assert table.rows[0][2:] == ("failed", "-", "-", "-")
    assert table.rows[1][-1] == "-"
    assert table.notes == (f"bad, 2x16x16: {failed.failure}",)


class SmallGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e-7


def test_small_gradients_of_float16_do_not_vanish():
    """They are 3e-8 where they enter, and float16 ends at 6e-8."""
    case = Case("training", "autocast-fp16", 2, (16, 24))
    assert not measure_one(small(change=SmallGradient.apply), case).failure


def test_models_that_draw_are_silenced():
    class DropPath(nn.Module):
        drop_prob = 0.5

    model = nn.Sequential(Small(), DropPath())
    silence(model)
    assert model[0].drop.p == model[1].drop_prob == 0


def test_a_graph_needs_cuda():
    for execution in ("graph", "compiled+graph"):
        with pytest.raises(ValueError, match=r"CUDA graph .* needs a CUDA device, got cpu"):
            measure_case([small()], Case("inference", "fp32", 1, (8, 8), execution), CPU, 0)


@pytest.fixture
def slow_and_fast(monkeypatch):
    """With a clock that only the models move, by 1/4 s and 1/16 s a call; the calls are noted."""
    calls, clock = [], {"time": 0.0}

    def model(name, seconds):
        def pass_time(logits):
            clock["time"] += seconds
            calls.append(name)
            return logits

        return small(name, change=pass_time)

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock["time"])
    return [model("slow", 1 / 4), model("fast", 1 / 16)], calls


def test_a_call_longer_than_a_turn_is_not_warmed_up(slow_and_fast):
    models, calls = slow_and_fast
    case = Case("inference", "fp32", 1, (16, 16))
    slow, fast = measure_case(models, case, CPU, seconds=0.375, rounds=3)
    assert (slow.calls, fast.calls) == (3, 6)
    # The reference in fp32 and the one that is checked, and in each turn what is timed: of 'fast'
    # there is one more.
    assert (calls.count("slow"), calls.count("fast")) == (2 + 3, 2 + 3 + 6)


def test_models_take_turns_and_ratios_are_those_of_their_times(slow_and_fast):
    models, calls = slow_and_fast
    case = Case("inference", "fp32", 4, (16, 16))
    results = measure_case(models, case, CPU, seconds=1.5, rounds=3)

    slow, fast = results
    # Half a second a turn: three turns of two and of eight calls.
    assert (slow.calls, fast.calls) == (6, 24)
    assert slow.seconds == slow.p20 == slow.p80 == 1 / 4
    assert slow.images_per_second == 16
    assert fast.images_per_second == 64
    assert reports.ratios(results) == [1, 4]
    assert [row[-1] for row in reports.throughput_table(results).rows] == ["1.00", "4.00"]
    turns = [name for name, _ in itertools.groupby(calls)]
    # Preparation, then there and back: neighbouring turns of one model are one group.
    assert turns == ["slow", "fast", "slow", "fast", "slow", "fast"]


def test_the_time_is_the_median(monkeypatch):
    durations = iter([1, 2, 3, 4, 100, 6])
    monkeypatch.setattr(
        throughput, "_timed", lambda call, device, seconds: [float(next(durations))]
    )
    result = measure_one(small(), Case("inference", "fp32", 7, (16, 16)), rounds=6)
    assert (result.p20, result.seconds, result.p80) == (2.0, 3.5, 6.0)
    assert result.images_per_second == 2.0
    (note,) = reports.throughput_table([result]).notes
    assert "vary by more than 25%" in note
    assert not reports.throughput_table([dataclasses.replace(result, p80=2.4)]).notes


def results_at(*sizes, memory=False):
    """Made-up results of two models."""
    return [
        Result(name, Case("inference", "fp32", 8, (size, size)), "", 10**7, s, s, s, 3, 8 / s, peak)
        for size in sizes
        for name, s, peak in [
            ("convnext-tiny", 1e-6 * size**2, 1e-5 * size**2 if memory else None),
            ("other", 2e-6 * size**2, 2e-5 * size**2 if memory else None),
        ]
    ]


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("memory", [False, True])
def test_the_table_shows_everything_at_any_width(width, memory):
    console = Console(width=width, record=True, file=io.StringIO())
    table = reports.throughput_table(results_at(224, memory=memory))
    console.print(table.rich())
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        for cell in itertools.chain(table.header, *table.rows):
            assert cell in text
        assert "inference, fp32, eager, 8x224x224" in text


def test_lines_over_resolution():
    panels = reports.throughput_panels(results_at(512, 224, memory=True))
    figure = reports.make_figure(panels)
    rates, memory = figure.axes
    assert rates.get_ylabel() == "throughput (images/s)"
    assert memory.get_ylabel() == "peak memory (GB)"
    for axes in figure.axes:
        assert axes.get_yscale() == axes.get_xscale() == "log"
        assert "pixels" in axes.get_xlabel()
        assert [line.get_label() for line in axes.lines] == ["convnext-tiny", "other"]
    assert list(rates.lines[1].get_xdata()) == [224, 512]
    assert list(rates.lines[1].get_ydata()) == pytest.approx([8 / 0.100352, 8 / 0.524288])
    assert list(memory.lines[0].get_ydata()) == pytest.approx([0.50176, 2.62144])


def test_bars_at_one_resolution(tmp_path):
    panels = reports.throughput_panels(results_at(224))
    (axes,) = reports.make_figure(panels).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([159.44, 79.72], rel=1e-3)
    reports.plot(panels, tmp_path / "new" / "bars.png")
    from matplotlib.image import imread

    picture = imread(tmp_path / "new" / "bars.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.1


def test_csv_rows_are_added_under_the_same_header_only(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    rows = [result.row() | {"device": "x"} for result in results_at(224)]
    reports.append_csv(file, rows)
    reports.append_csv(file, rows[:1])
    with file.open(encoding="utf-8") as stream:
        read = list(csv.DictReader(stream))
    first, second = "convnext-tiny", "other"
    assert [row["model"] for row in read] == [first, second, first]
    assert (read[0]["height"], read[0]["failure"], read[0]["peak_gb"]) == ("224", "", "")
    before = file.read_text()
    with pytest.raises(UsageError, match=r"rows\.csv has other columns"):
        reports.append_csv(file, [row | {"more": 1} for row in rows])
    assert file.read_text() == before


def test_a_section_of_a_markdown_file_is_replaced(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Title\n<!-- begin one -->\nold\n<!-- end one -->\nrest\n")
    table = reports.throughput_table(results_at(224)).markdown()
    for _ in range(2):
        reports.write_section(file, "one", table)
    text = file.read_text()
    assert text.startswith("# Title\n<!-- begin one -->\n\n**inference, fp32, eager, 8x224x224**")
    assert text.endswith("<!-- end one -->\nrest\n")
    assert "old" not in text
    assert "| other | 10.0 | 100.4 | 100.4-100.4 | 79.7 | 0.50 |" in text
    assert text.count("| other |") == 1
    with pytest.raises(UsageError, match="no section 'two'"):
        reports.write_section(file, "two", table)


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark")


@pytest.fixture
def run_tool(tool, monkeypatch, tmp_path, capsys):
    """Runs the command line in this process; gives its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", *arguments])
        try:
            tool.main()
            status = 0
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [("224", (None, (224, 224))), ("8x16", (None, (8, 16))), ("2x8x16", (2, (8, 16)))],
)
def test_sizes(tool, text, expected):
    assert tool.shape(text) == expected


@pytest.mark.parametrize("text", ["0", "x", "8x", "1x2x3x4", "-3"])
def test_what_is_no_size(tool, text):
    with pytest.raises(ValueError):  # noqa: PT011 (argparse makes the message)
        tool.shape(text)


def test_default_batches_of_the_cpu(tool):
    options = tool.parse_arguments(["--device", "cpu", "--sizes", "224", "7x32x64"])
    cases = tool.cases(options, options.passes, options.sizes)
    assert [str(case) for case in cases] == [
        "inference, fp32, eager, 1x224x224",
        "inference, fp32, eager, 7x32x64",
        "training, fp32, eager, 4x224x224",
        "training, fp32, eager, 7x32x64",
    ]


def test_command_line(run_tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin measured -->\n<!-- end measured -->\n")
    outputs = ["--csv", "new/rows.csv", "--plot", "new/plot.png", "--markdown", "page.md"]
    models = ["deit-tiny", "resnet18"]
    options = ["--sizes", "32", "32x64", "--seconds", "0", "--rounds", "1"]
    status, out, _ = run_tool(*models, *options, "--passes", "inference", *outputs)
    assert status == 0
    rows = list(csv.DictReader((tmp_path / "new/rows.csv").open(encoding="utf-8")))
    expected = itertools.product([("32", "32"), ("32", "64")], models)
    assert [((row["height"], row["width"]), row["model"]) for row in rows] == list(expected)
    assert all(float(row["seconds"]) > 0 and row["torch"] == torch.__version__ for row in rows)
    assert "inference, fp32, eager, 1x32x64" in out
    assert "…" not in out
    assert "relative" in page.read_text()
    assert "benchmark.py --device cpu deit-tiny resnet18 --sizes 32 32x64" in page.read_text()
    assert (tmp_path / "new/plot.png").stat().st_size > 10_000


def test_a_failed_model_is_the_exit_status(run_tool, tmp_path):
    options = ["--sizes", "32", "--seconds", "0", "--rounds", "1", "--passes", "inference"]
    # Patches of 16 pixels do not fit images of 40.
    options[1] = "40"
    status, out, _ = run_tool("xcit_nano_12_p16_224", "resnet18", *options, "--csv", "rows.csv")
    assert status == "error: 1 of 2 measurements failed, see above."
    assert "failed" in out
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))
    assert "patch_size" in rows[0]["failure"]
    assert rows[0]["seconds"] == ""
    assert float(rows[1]["seconds"]) > 0


def test_runtimes_are_rows_of_one_table(run_tool, tmp_path, monkeypatch):
    """What they compute is tested in tests/deployment."""
    asked = []

    def in_runtime(model, images, runtime):
        asked.append((runtime, images.shape))
        return model

    monkeypatch.setattr("mmvmamba.deployment.runtimes.in_runtime", in_runtime)
    options = ["--sizes", "32", "--seconds", "0", "--rounds", "1", "--passes", "inference"]
    runtimes = ["eager", "onnxruntime", "onnxruntime+cpp", "openvino"]
    status, out, _ = run_tool("resnet18", *options, "--runtime", *runtimes, "--csv", "rows.csv")
    assert status == 0, out
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))
    assert [row["model"] for row in rows] == [f"resnet18, {name}" for name in runtimes]
    assert [row["execution"] for row in rows] == runtimes
    assert asked == [(name, (1, 3, 32, 32)) for name in runtimes[1:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swin_tin"], "error: 'swin_tin' is neither .*Did you mean .*swin-tiny"),
        (["--execution", "graph"], "error: a CUDA graph .*needs a CUDA device"),
        (["--runtime", "openvino"], "error: openvino runs inference in fp32 on the CPU"),
        (["--csv", "other.csv"], "error: other.csv has other columns"),
        (["--markdown", "none.md"], "error: none.md has no section 'measured'"),
        (["--plot", "plot.doc"], r"error: --plot plot\.doc: choose one of .*\.png"),
        (["configs/nothing.py"], "error: no config configs/nothing.py"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    run_tool, tool, tmp_path, monkeypatch, arguments, message
):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(tool, "measure", lambda *_: pytest.fail("something was measured"))
    status, _, _ = run_tool(*arguments)
    assert isinstance(status, str)
    assert re.match(message, status)
