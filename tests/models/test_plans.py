"""Plans of evaluation on a CPU: the numbers of the forward pass, and of none that was."""

import contextlib
import copy
import gc
import io
import threading
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.models import VMamba, cpu, layers, official, plans, ss2d
from mmvmamba_kernels import register_pattern

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="this PyTorch packs no weights")

CHANNELS = 24


def build(cls=layers.VSSBlock, **options):
    """A block whose parts all matter, in evaluation."""
    torch.manual_seed(0)
    mixer = {k: options.pop(k) for k in list(options) if k not in ("mlp_ratio", "mlp_act", "norm")}
    block = cls(CHANNELS, ss2d.SS2D(CHANNELS, **mixer), drop_path=0.5, mlp_drop=0.5, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.eval()


def map_of(*shape, seed=1):
    return torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed))


def plan_of(block):
    kept = vars(block).get("_kept")
    return None if kept is None else kept.plan


@contextlib.contextmanager
def no_plans():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "run", lambda module, x: None)
        yield


@torch.no_grad()
def check(block, x, planned=True):
    """The block gives what it gives without plans, bit for bit, at the first call and the next."""
    with no_plans():
        expected = block(x)
    for _ in range(2):
        assert torch.equal(block(x), expected)
    assert (plan_of(block) is not None) == planned
    return expected


def reversed_rows(height, width):
    return torch.arange(height * width).flip(0)[None]


OPTIONS = [
    {},
    {"gated": True, "mlp_ratio": 0, "d_state": 3, "ssm_ratio": 2.0, "dwconv_bias": True},
    {"dwconv": False, "act": "gelu", "mlp_act": "relu", "scan": "unidi"},
    {"gated": True, "act": "relu", "mlp_act": "silu", "scan": "bidi", "dt_rank": 5},
    {"scan": "hilbert", "d_state": 2},
    {"scan": "atrous2", "ssm_ratio": 1.5},
    {"scan": reversed_rows, "init": "rand"},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_a_plan_gives_the_forward_passes_numbers(options):
    block = build(**options)
    for shape in ((1, 6, 9), (3, 1, 5), (1, 50, 60), (1, 6, 9)):
        check(block, map_of(*shape))
    # Not contiguous, as the downsampling's maps may be.
    check(block, map_of(1, 9, 6).transpose(1, 2))


def test_parts_used_alone_have_plans():
    block = build()
    for part in (block.op, block.mlp):
        check(part, map_of(2, 5, 7))
    with torch.inference_mode():
        check(block, map_of(2, 5, 7))


@pytest.mark.parametrize("options", [{"norm": "bn"}, {"scan": "cascade2d"}], ids=str)
def test_what_no_plan_knows_runs_without_one(options):
    check(build(**options), map_of(1, 5, 7), planned=False)


def test_official_blocks_have_plans():
    torch.manual_seed(0)
    block = official.VSSBlock(CHANNELS, channel_first=True, forward_type="v05_noz").eval()
    x = map_of(1, 5, 7).permute(0, 3, 1, 2)
    check(block, x)
    mixer = official.SS2D(CHANNELS, channel_first=True, forward_type="v05_noz").eval()
    check(mixer, x, planned=False)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(block):
    block.mlp.fc1 = copy.deepcopy(block.mlp.fc1)
    block.mlp.fc1.weight = nn.Parameter(0.5 * block.mlp.fc1.weight)


def hooked(block):
    block.op.out_proj.register_forward_hook(lambda module, args, out: 2 * out)


def forward_on_an_instance(block):
    block.mlp.fc2.forward = lambda x: 2 * nn.Linear.forward(block.mlp.fc2, x)


def of_another_class(block):
    block.mlp.fc2.__class__ = Twice


def pruned_by_hand(block):
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.data[:40]
    block.mlp.fc1.bias.data = block.mlp.fc1.bias.data[:40]
    block.mlp.fc1.out_features = 40
    block.mlp.fc2.weight.data = block.mlp.fc2.weight.data[:, :40].contiguous()
    block.mlp.fc2.in_features = 40


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.op.in_proj)
    with torch.no_grad():
        block.op.in_proj.parametrizations.weight.original0.mul_(2)


def parametrized_by_a_buffer(block):
    nn.utils.parametrizations.spectral_norm(block.op.in_proj)
    block.eval()


def a_buffer_in_place_of_a_parameter(block):
    values = block.op.A_logs.detach() + 0.5
    del block.op.A_logs
    block.op.register_buffer("A_logs", values)


def a_tensor_in_place_of_a_parameter(block):
    values = 0.5 * block.mlp.fc1.weight.detach()
    del block.mlp.fc1.weight
    block.mlp.fc1.weight = values


def a_method_of_an_instance(block):
    scan = block.op._scan
    block.op._scan = lambda x: 2 * scan(x)


def a_norm_of_an_instance(block):
    of_sum = block.norm2.of_sum
    block.norm2.of_sum = lambda *args: [2 * t for t in of_sum(*args)]


class Halved(layers.DropPath):
    def scale(self, x):
        return torch.full((len(x),), 0.5)


def every_parameter_in_place(block):
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.01)


def every_parameter_by_data(block):
    for parameter in block.parameters():
        parameter.data.mul_(1.01)


def one_scan_parameter_by_data(block):
    block.op.A_logs.data[3] += 0.5


def attribute(path, value):
    def change(block):
        *parents, name = path.split(".")
        for parent in parents:
            block = getattr(block, parent)
        setattr(block, name, value)

    change.__name__ = path
    return change


# Whether a block that was changed so still has a plan.
CHANGES = {
    replaced: True,
    hooked: False,
    forward_on_an_instance: False,
    of_another_class: False,
    pruned_by_hand: True,
    parametrized: False,
    parametrized_by_a_buffer: False,
    a_buffer_in_place_of_a_parameter: False,
    a_tensor_in_place_of_a_parameter: False,
    a_method_of_an_instance: False,
    a_norm_of_an_instance: False,
    attribute("drop_path", Halved(0.5).eval()): False,
    every_parameter_in_place: True,
    every_parameter_by_data: True,
    one_scan_parameter_by_data: True,
    attribute("norm.eps", 0.5): True,
    attribute("op.scan", "unidi"): True,
    attribute("op.act", "relu"): True,
    attribute("mlp.act", "silu"): True,
    attribute("op.conv2d.padding_mode", "circular"): False,
    attribute("op.dropout", nn.Sequential(nn.ReLU())): False,
    attribute("mlp", None): True,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_ends_with_what_it_was_made_of(change):
    block, x = build(), map_of(1, 5, 7)
    before = check(block, x)
    change(block)
    if change.__name__ == "op.conv2d.padding_mode":
        block.op.conv2d._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with torch.no_grad():
        # At once: the next call already.
        after = block(x)
    assert not torch.equal(after, before)
    assert torch.equal(check(block, x, planned=CHANGES[change]), after)


def wide_kernel(block):
    block.op.conv2d.weight = nn.Parameter(torch.randn(CHANNELS, 1, 5, 5))


def more_states(block):
    block.op.A_logs = nn.Parameter(torch.zeros(4 * CHANNELS, 16))


def fewer_rows(block):
    block.op.x_proj_weight.data = block.op.x_proj_weight.data[:, :2].contiguous()


def no_bias(block):
    block.norm.bias = None


@pytest.mark.parametrize("change", [wide_kernel, more_states, fewer_rows, no_bias])
def test_what_cannot_be_computed_is_told_every_time(change):
    block, x = build(), map_of(1, 5, 7)
    check(block, x)
    change(block)
    for _ in range(3):
        with torch.no_grad(), pytest.raises((ValueError, TypeError)):
            block(x)


def test_an_mlp_that_was_pruned_by_hand_runs_whatever_its_attributes_say():
    block, x = build(), map_of(1, 5, 7)
    check(block, x)
    pruned_by_hand(block)
    block.mlp.fc1.out_features = block.mlp.fc2.in_features = 4 * CHANNELS
    check(block, x)


def test_parameters_that_are_shared_or_taken_away_are_not_read_where_they_were():
    block, x = build(), map_of(1, 5, 7)
    y = check(block, x)
    # As for another process: the memory that the parameters had is given back.
    ForkingPickler.dumps(block)
    assert torch.equal(check(block, x), y)
    # As for offloading, where it comes back.
    block = copy.deepcopy(block)
    check(block, x)
    storage, values = block.mlp.fc1.weight.untyped_storage(), block.mlp.fc1.weight.detach().clone()
    storage.resize_(0)
    storage.resize_(values.untyped_storage().nbytes())
    block.mlp.fc1.weight.data.copy_(values)
    assert torch.equal(check(block, x), y)


def test_mixers_of_other_kinds_run_without_a_plan():
    mixer, x = ss2d.SS2D(CHANNELS).eval(), map_of(1, 5, 7)
    with torch.no_grad():
        traced = torch.jit.trace(mixer, x, check_trace=False)
    check(layers.VSSBlock(CHANNELS, traced).eval(), x, planned=False)
    nested = official.VSSBlock(5, channel_first=True).eval()
    check(layers.VSSBlock(CHANNELS, nested).eval(), torch.randn(1, 5, CHANNELS, CHANNELS), False)


def test_hooks_of_all_modules_see_every_part():
    block, x, seen = build(), map_of(1, 5, 7), []
    check(block, x)
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        block(x)
        handle.remove()
    assert set(seen) >= {block, block.norm, block.op, block.op.in_proj, block.mlp, block.mlp.fc2}


def test_classes_that_are_changed_are_run_as_they_are(monkeypatch):
    block, x = build(), map_of(1, 5, 7)
    before = check(block, x)
    with monkeypatch.context() as patch:
        patch.setattr(layers.Mlp, "forward", lambda self, x: 0 * x)
        assert not torch.equal(check(block, x, planned=False), before)
    check(block, x)
    for kind, name in (
        (nn.Dropout, "forward"),
        (layers.DropPath, "forward"),
        (layers.LayerNorm, "forward"),
        (layers.LayerNorm, "of_sum"),
        (ss2d.SS2D, "_scan_parameters"),
        (nn.Module, "__call__"),
    ):
        original = getattr(kind, name)

        def doubled(*args, original=original, **kwargs):
            result = original(*args, **kwargs)
            return [2 * t for t in result] if isinstance(result, tuple) else 2 * result

        with monkeypatch.context() as patch:
            patch.setattr(kind, name, doubled)
            assert not torch.equal(check(build(), x, planned=False), before)
        check(block, x)


def test_a_subclass_has_no_plan_of_its_base():
    class Doubled(layers.VSSBlock):
        def _forward(self, x):
            return 2 * super()._forward(x)

    block, x = build(Doubled), map_of(1, 5, 7)
    expected = 2 * check(build(), x)
    with torch.no_grad():
        # super()'s pass asks for a plan too.
        assert torch.equal(block(x), expected)
    assert plan_of(block) is None


def test_training_and_gradients_know_no_plan():
    block, x = build(), map_of(2, 5, 7)
    check(block, x)
    plan = weakref.ref(plan_of(block))
    block.train()
    gc.collect()
    assert plan() is None
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))
    assert plan_of(block) is None
    block.eval()
    block.mlp.drop.train()
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))
    assert plan_of(block) is None
    block.eval()(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_other_dtypes_and_autocast_know_no_plan():
    block, x = build(), map_of(1, 5, 7)
    check(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        check(block, x)
        with torch.no_grad(), no_plans():
            expected = block(x)
        with torch.no_grad():
            assert torch.equal(block(x), expected)
    check(block.double(), x.double(), planned=False)


def test_counters_see_the_same_operations_as_ever():
    block, x = build(), map_of(1, 5, 7)
    check(block, x)
    counts = []
    for context in (contextlib.nullcontext, no_plans):
        with torch.no_grad(), context(), FlopCounterMode(display=False) as counter:
            block(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_environments_backend_is_asked_for_anew(monkeypatch):
    block, x = build(), map_of(1, 5, 7)
    before = check(block, x)
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", "reference")
    after = check(block, x)
    # The scan's sums in another order, of numbers near one.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)


def test_copies_and_files_have_no_plan_and_plans_no_copies():
    block, x = build(), map_of(1, 5, 7)
    y = check(block, x)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert plan_of(other) is None
        with torch.no_grad():
            other.mlp.fc1.weight.mul_(2)
        assert not torch.equal(check(other, x), y)
    # Copies of the attributes alone share the original's parts.
    y = check(block.op, x)
    shallow = copy.copy(block.op)
    shallow.scan = "unidi"
    assert not torch.equal(check(shallow, x), y)
    assert torch.equal(check(block.op, x), y)


def test_modules_are_freed_with_their_plans():
    block = build()
    check(block, map_of(1, 5, 7))
    weight = weakref.ref(block.mlp.fc1.weight)
    del block
    gc.collect()
    assert weight() is None


def test_threads_share_a_model():
    block = build()
    maps = [map_of(1, 9, 11, seed=seed) for seed in range(8)]
    maps += [map_of(2, 5, 7, seed=seed) for seed in range(8)]
    with torch.no_grad(), no_plans():
        expected = [block(x) for x in maps]
    wrong = []

    def work(mine):
        with torch.no_grad():
            for _ in range(20):
                wrong.extend(i for i in mine if not torch.equal(block(maps[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(range(i, 16, 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_backbone_runs_by_plans_and_as_before():
    torch.manual_seed(0)
    model = VMamba.of_one_block_a_stage("tiny").eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        with no_plans():
            expected = model(x)
        for _ in range(2):
            for y, wanted in zip(model(x), expected, strict=True):
                assert torch.equal(y, wanted)
    blocks = [m for m in model.modules() if isinstance(m, layers.VSSBlock)]
    assert len(blocks) == 4
    assert all(map(plan_of, blocks))


def test_shapes_that_do_not_fit_are_told_as_ever():
    block = build()
    check(block, map_of(1, 5, 7))
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=str(CHANNELS)):
        block(torch.randn(1, 5, 7, CHANNELS + 1))


def test_a_pattern_that_is_dropped_from_memory_still_runs(monkeypatch):
    from mmvmamba_kernels import path_lists

    register_pattern("backwards", lambda h, w: torch.arange(h * w).flip(0)[None])
    block, x = build(scan="backwards"), map_of(1, 5, 7)
    y = check(block, x)
    path_lists._of_pattern.cache_clear()
    path_lists._make.cache_clear()
    gc.collect()
    # What is in the place of freed memory is another list.
    filler = [torch.full((1, 36), -1, dtype=torch.int32) for _ in range(64)]
    with torch.no_grad():
        assert torch.equal(block(x), y)
    assert filler
