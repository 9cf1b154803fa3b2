"""Checkpoints that do not fit are refused by name, and leave the model as it was."""

import pytest
import torch
from torch import nn

from mmvmamba.engine.runner import load_strictly
from mmvmamba.models import VMamba
from mmvmamba.models.checkpoint import CheckpointError


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))


def test_a_fitting_file_is_loaded(model):
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    assert load_strictly(model, state, "file.pth") == len(state)
    assert (model[0].weight == 1).all()


def test_a_missing_batch_counter_is_no_fault(model):
    state = model.state_dict()
    del state["1.num_batches_tracked"]
    assert load_strictly(model, state, "file.pth") == len(state)


def test_every_mismatch_is_named_and_nothing_is_loaded(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    state["3.weight"] = state.pop("2.weight")
    state["0.weight"] = torch.ones(5, 2)
    with pytest.raises(CheckpointError) as error:
        load_strictly(model, state, "file.pth")
    text = str(error.value)
    assert "1 missing in the file:\n    2.weight" in text
    assert "1 unknown to the model:\n    3.weight" in text
    assert "0.weight (5, 2), the model's is (3, 2)" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_as_many_numbers_in_another_shape_are_refused_too(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.ones_like(value) for key, value in before.items()}
    state["0.weight"] = torch.ones(2, 3)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        load_strictly(model, state, "file.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_ignored_prefix_may_be_a_plain_string(model):
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    assert load_strictly(model, state, "file.pth", "2.") == len(state) - 2


def test_a_long_list_is_cut(model):
    with pytest.raises(CheckpointError, match="30 unknown(.*\n)*.*and 10 more"):
        load_strictly(
            model, {**model.state_dict(), **{f"x{i}": torch.ones(1) for i in range(30)}}, "file"
        )


def test_ignored_parts_keep_their_values(model):
    before = model[2].weight.clone()
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    state["2.weight"] = torch.ones(9, 9)
    state["old_head.weight"] = torch.ones(1)
    assert load_strictly(model, state, "file.pth", ["2.", "old_head"]) == len(state) - 3
    assert torch.equal(model[2].weight, before)
    assert (model[0].weight == 1).all()


def test_a_prefix_that_means_nothing_is_a_mistake(model):
    with pytest.raises(CheckpointError, match="neither the model nor file.pth"):
        load_strictly(model, model.state_dict(), "file.pth", ["haed"])


def test_nothing_left_to_load_is_refused(model):
    with pytest.raises(CheckpointError, match="no key is left"):
        load_strictly(model, model.state_dict(), "file.pth", ["0", "1", "2"])


def test_a_whole_model_of_other_channels():
    """As `load_from` with `load_in_channels` does it."""
    found, wanted = (
        nn.ModuleDict({"backbone": VMamba({"dims": 8, "depths": (1,)}, in_channels=channels)})
        for channels in (3, 4)
    )
    state, key = found.state_dict(), "backbone.patch_embed.0.weight"
    with pytest.raises(CheckpointError, match="model's have 4: load_in_channels .*='repeat'"):
        load_strictly(wanted, state, "file.pth")
    assert load_strictly(wanted, state, "file.pth", in_channels="repeat") == len(state)
    for name, value in wanted.state_dict().items():
        expected = state[name][:, [0, 1, 2, 0]] * 0.75 if name == key else state[name]
        torch.testing.assert_close(value, expected)
