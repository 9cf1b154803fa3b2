"""The scan patterns: which path each direction takes over the map."""

from __future__ import annotations

from typing import NamedTuple


class Path(NamedTuple):
    """One direction's order of positions."""

    column_major: bool
    """Columns one after another instead of rows."""
    reverse: bool
    """From the last position to the first."""
    per_line: bool = False
    """Every row (or column) is a sequence of its own, starting from a zero state."""

    def sequences(self, height: int, width: int) -> tuple[int, int]:
        """Number of sequences of one map, and positions of each."""
        lines, length = (width, height) if self.column_major else (height, width)
        return (lines, length) if self.per_line else (1, lines * length)


PATTERNS: dict[str, tuple[Path, ...]] = {
    "cross2d": (Path(False, False), Path(True, False), Path(False, True), Path(True, True)),
    "unidi": (Path(False, False),) * 4,
    "bidi": (Path(False, False),) * 2 + (Path(False, True),) * 2,
    "rows": (Path(False, False, True), Path(False, True, True)),
    "columns": (Path(True, False, True), Path(True, True, True)),
}
"""Path of direction k of each pattern; the number of directions K is the tuple's length."""
