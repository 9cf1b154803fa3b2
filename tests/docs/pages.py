"""The Markdown that users read: its blocks of code, and what is said of those that are not run."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Pages whose blocks another test runs, each in its order and with the data that it needs.
FOLLOWED = {
    "docs/building.md": "tests/integration/test_guides.py",
    "docs/migrate.md": "tests/integration/test_guides.py",
    "docs/own_data.md": "tests/integration/test_own_data_guide.py",
    "docs/finetune_classifier.md": "tests/integration/test_own_data_guide.py",
}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# Tables that benchmark.py writes, below the command that measured them.
SECTION = re.compile(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Its file, from the project's folder.
        line: The number of its first line.
        language: 'bash' or 'python'.
        text: The code.
        reason: Why it is not run; empty if it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments and without variables set before it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        prefix = re.compile(r"[A-Z_]+=")
        found = []
        for command in words:
            while command and prefix.match(command[0]):
                command = command[1:]  # noqa: PLW2901 (the command that is left)
            if command:
                found.append(command)
        return found


def pages() -> list[str]:
    """All pages, from the project's folder."""
    names = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "kernels/README.md"]
    folders = ("docs/**/*.md", "configs/*/README.md", "kernels/benchmarks/**/README.md")
    found = (path for folder in folders for path in PROJECT.glob(folder))
    return [*names, *sorted(path.relative_to(PROJECT).as_posix() for path in found)]


def blocks() -> Iterator[Block]:
    """The blocks of all pages but those that other tests follow."""
    for page in pages():
        if page in FOLLOWED:
            continue
        text = (PROJECT / page).read_text(encoding="utf-8")
        measured = [match.span() for match in SECTION.finditer(text)]
        for match in BLOCK.finditer(text):
            inside = any(begin <= match.start() < end for begin, end in measured)
            reason = match["reason"] or ("a measurement" if inside else "")
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page, line, match["language"], match["text"], reason)
