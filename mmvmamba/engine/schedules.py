"""Warm-ups that fit the length of their training.

A recipe's warm-up has the length that its own training needs. In a training of another length it
may take most of the time or all of it, so that the learning rate never reaches its peak.
"""

from collections.abc import Sequence
from fractions import Fraction

from mmvmamba.engine.tasks import type_name

# A warm-up of more than this share of the training does not fit, and gets the other one.
LONGEST, SHORTENED = Fraction(1, 2), Fraction(1, 10)

# mmengine's schedulers that warm up, by the beginning of their names: of lr, momentum, ...
KINDS = {"Linear": ("start_factor", "end_factor"), "Constant": ("factor", None), "Quadratic": None}


def fit_warm_up(
    schedulers: dict | Sequence[dict], iterations: int, epoch_length: int
) -> tuple[list, list[str]]:
    """Shortens warm-ups that do not fit their training.

    One that takes more than half of the training takes a tenth, and what was to follow it follows
    it still. One of a single step, after which mmengine's schedulers leave the rate for good where
    they began, takes two, and one of a single epoch goes by iterations. All others stay as they
    are, and so does a rate that does nothing else than rise through the whole training.

    Args:
        schedulers: The config's `param_scheduler`; what are no dicts are left alone.
        iterations: Steps of the whole training.
        epoch_length: Steps of an epoch.

    Returns:
        The schedulers, and a line about each that was changed.
    """
    if not isinstance(schedulers, list | tuple):
        schedulers = [schedulers] if schedulers else []
    ends: dict[int, int] = {}
    kept, lines = [], []
    for one in schedulers:
        if not _warms_up(one):
            kept.append(one)
            continue
        by_epoch = one.get("by_epoch", True)
        end = int(one["end"] * (epoch_length if by_epoch else 1))
        new = int(iterations * SHORTENED) if end > iterations * LONGEST else end
        if len(schedulers) == 1 and end == iterations:
            # The search for a learning rate.
            new = end
        # The first step is at the factor, the second at the peak.
        new = max(new, 2)
        single = by_epoch and not one.get("convert_to_iter_based") and one["end"] < 2
        if new == end and not single:
            kept.append(one)
            continue
        ends[end] = new
        lines.append(
            f"the warm-up ({type_name(one)}) is {end} iterations long, the training {iterations}: "
            f"the warm-up is changed to {new} iterations"
        )
        kept.append({**one, "by_epoch": False, "convert_to_iter_based": False, "end": new})
    return [_moved(one, ends, iterations, epoch_length) for one in kept], lines


def _warms_up(one) -> bool:
    if not isinstance(one, dict) or one.get("begin", 0) != 0 or "end" not in one:
        return False
    for kind, factors in KINDS.items():
        if type_name(one).startswith(kind):
            if factors is None:
                return True
            begin, end = factors
            return one.get(begin, 1 / 3) < one.get(end, 1.0)
    return False


def _moved(one, ends: dict[int, int], iterations: int, epoch_length: int):
    """A scheduler that begins where a warm-up now ends, if it began where it ended before."""
    if not isinstance(one, dict) or not one.get("begin"):
        return one
    by_epoch = one.get("by_epoch", True)
    unit = epoch_length if by_epoch else 1
    begin = int(one["begin"] * unit)
    if begin not in ends:
        return one
    new = ends[begin]
    # mmengine multiplies by the length again, which a float would not survive.
    converted = by_epoch and one.get("convert_to_iter_based")
    moved = {**one, "begin": Fraction(new, unit) if converted else new // unit}
    if new >= min(iterations, one.get("end", iterations) * unit):
        # Nothing is left of it here, but a longer training may be resumed from this one.
        moved["end"] = moved["begin"] + 1
    return moved
