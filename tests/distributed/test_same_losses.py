"""Any number of processes, on one machine or two, train as one process with the same global batch.

Detection has no such test: its losses are divided by each process's own number of positives, and
its samplers choose among each process's own boxes.
"""

import pytest
from jobs import GLOBAL_BATCH, STEPS, TOLERANCE, curves


def test_two_machines(alone, pair):
    """One process on each, through tools/dist_train.sh, the learning rate scaled."""
    expected = alone("classifier")
    # A linear start at a hundredth of 1e-3, which the config has for 16 images.
    assert pair["lr", 0] == pytest.approx(1e-3 / 100 * GLOBAL_BATCH / 16)
    assert pair == pytest.approx(expected, rel=TOLERANCE)
    losses = [expected["loss", step] for step in range(STEPS)]
    # From step to step they change by far more than they may differ.
    changes = [abs(losses[step] - losses[step + 1]) for step in range(STEPS - 1)]
    assert min(changes) > 100 * TOLERANCE * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["classifier", "segmentor"])
@pytest.mark.parametrize("processes", [2, 4])
def test_one_machine(recipe, processes, alone, arguments, train, tmp_path):
    (end,) = train(arguments(tmp_path, processes, recipe=recipe), processes)
    assert end.code == 0, end.output[-4000:]
    assert curves(tmp_path) == pytest.approx(alone(recipe), rel=TOLERANCE)
