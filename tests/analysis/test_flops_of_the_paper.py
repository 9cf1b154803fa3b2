"""Parameters and FLOPs of every row of the paper's tables, counted at the paper's sizes."""

import functools
import json
import re
from copy import deepcopy

import pytest
from mmengine.config import Config

from mmvmamba.analysis.flops import Complexity, count_config
from mmvmamba.engine.cli import load_config

# The tables that the paper gives FLOPs in.
TABLES = ("3, 4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15")
# Rows that say again what others do: S and B differ from T in depths and widths, which table 3, 4
# counts, and sizes between the smallest and the largest lie on one line.
AGAIN = re.compile(r"table [678]: .*-[SB](\[s2l15\])?|table 9: .* at (288|384|512|640)")


@functools.cache
def paper(project) -> list[dict]:
    return json.loads((project / "tests/data/paper_complexity.json").read_text())["tables"]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        rows = {
            f"table {table['table']}: {row['row']}": {**table, **row}
            for table in paper(metafunc.config.rootpath)
            for row in table["rows"]
        }
        cases = [
            pytest.param(row, id=name, marks=pytest.mark.slow if AGAIN.fullmatch(name) else ())
            for name, row in rows.items()
        ]
        metafunc.parametrize("row", cases)


@functools.cache
def read_config(name: str) -> Config:
    return load_config(name if "::" in name else f"configs/{name}")


@functools.cache
def count(config: str, changes: str, width: int | None, shape: tuple[int, int]) -> Complexity:
    """Counts a config's model, or the same model on another backbone."""
    backbone = json.loads(changes)
    cfg = deepcopy(read_config(config))
    if "type" not in backbone:
        cfg.model.backbone.update(backbone)
        return count_config(cfg, shape)
    cfg.model.backbone = backbone
    widths = [width * 2**i for i in range(4)]
    if cfg.default_scope == "mmdet":
        cfg.model.neck.in_channels = widths
    else:
        cfg.model.decode_head.in_channels = widths
        cfg.model.auxiliary_head.in_channels = widths[2]
    return count_config(cfg, shape)


def test_row(row):
    changes = json.dumps(row.get("backbone", {}), sort_keys=True)
    found = count(row["config"], changes, row.get("width"), tuple(row["shape"]))
    expected = row.get("expected", row)
    assert found.flops / 1e9 == pytest.approx(expected["flops"], rel=row["tolerance"])
    # As exactly as the paper gives them: half of the last digit.
    digits = len(str(expected["params"]).partition(".")[2])
    assert found.params / 1e6 == pytest.approx(expected["params"], abs=0.5 * 10**-digits)


def test_every_table_is_there_and_a_deviation_says_why(project):
    assert [table["table"] for table in paper(project)] == list(TABLES)
    for row in (row for table in paper(project) for row in table["rows"]):
        assert ("expected" in row) == ("why" in row), row
