"""Parameters and FLOPs of every row of the paper's tables, counted at the paper's sizes."""

import re

import pytest

from mmvmamba.analysis.paper_tables import Row, read_tables

# The tables that the paper gives parameters in.
TABLES = (
    *("1", "2, COCO 1x", "2, COCO 3x", "2, ADE20K", "3, 4"),
    *("5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15"),
)
# Rows that say again what others do: table 1 is of the models of 6, and all of table 2 but NAT-T of
# those of 7 and 8, of upstream's configs, or of other heads; S and B differ from T in depths and
# widths, which table 3, 4 counts, peers in table 8 are those of 7 with its VMamba-T's heads, and
# sizes between the smallest and the largest lie on one line, which one model is enough to show.
# Initial values and activations cost nothing (11, 15), and states and ratios between others' no
# other way.
AGAIN = re.compile(
    r"table 1: .*|table 2, ADE20K: .*|table 2, COCO [^:]*: (?!NAT-T).*"
    r"|table [678]: .*-[SB](\[s2l15\])?|table 6: (XCiT-[SM]24.*|XCiT-S12/16|HiViT-T)"
    r"|table 7: Vanilla-VMamba-T|table 8: (Vanilla-VMamba|Swin|ConvNeXt)-T"
    r"|table 3, 4: (Vanilla-VMamba-[SB]|VMamba-S)"
    r"|table 9: (XCiT|HiViT).*|table 9: .* at (288|384|512|640)"
    r"|table 9: (?!VMamba-T at).* at 768"
    r"|table 10: (Unidi|Bidi)-Scan, with dwconv|table 10: Cascade-Scan, without dwconv"
    r"|table 11: .*|table 12: d_state [48].*|table 14: mlp-ratio 3.*|table 15: (ReLU|GELU)"
)


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        rows = {
            f"table {table.name}: {row.name}": row for table in read_tables() for row in table.rows
        }
        cases = [
            pytest.param(row, id=name, marks=pytest.mark.slow if AGAIN.fullmatch(name) else ())
            for name, row in rows.items()
        ]
        metafunc.parametrize("row", cases)


COUNTED = {}


def count(row: Row):
    key = row.model, row.shape
    if key not in COUNTED:
        COUNTED[key] = row.count()
    return COUNTED[key]


def test_row(row):
    found = count(row)
    expected = row.expected or {"params": row.params, "flops": row.flops}
    if expected["flops"] is not None:
        assert found.flops / 1e9 == pytest.approx(expected["flops"], rel=row.tolerance)
    # As exactly as the paper gives them: half of the last digit.
    digits = len(str(expected["params"]).partition(".")[2])
    assert found.params / 1e6 == pytest.approx(expected["params"], abs=0.5 * 10**-digits)


def test_every_table_is_there_and_a_deviation_says_why():
    assert tuple(table.name for table in read_tables()) == TABLES
    for row in (row for table in read_tables() for row in table.rows):
        assert bool(row.expected) == bool(row.why), row
