"""Grids of test cases, thinned."""

import itertools

import pytest


def pairwise(names, *axes, **options):
    """As ``pytest.mark.parametrize`` over all combinations of the axes' values.

    The default run takes so many of them that every two values of two axes meet; the others are
    slow tests.
    """
    rows = list(itertools.product(*(range(len(values)) for values in axes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen.add(best)
    cases = [
        pytest.param(
            *(values[i] for values, i in zip(axes, row, strict=True)),
            marks=() if row in chosen else pytest.mark.slow,
        )
        for row in rows
    ]
    return pytest.mark.parametrize(names, cases, ids=str, **options)
