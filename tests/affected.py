"""Which test files a change can affect, by what they import and name.

`python tests/affected.py [FILE ...]` lists them, by default for what differs from the last commit.
"""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# Where modules are imported from: the package's folder, the kernels', and a test's helpers.
ROOTS = ("kernels", "tests", "")
# Used by every test, so that to run the tests of a change to it is to run them all.
OF_ALL_TESTS = "tests/conftest.py"


def changed_files(base: str = "HEAD", root: Path = PROJECT) -> list[str]:
    """Files that differ from a commit, and those that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(
            ["git", *arguments], cwd=root, text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise ValueError(f"no comparison with {base!r} is possible: {done.stderr.strip()}")
        return [name for name in done.stdout.split("\0") if name]

    changed = git("diff", "--name-only", "--no-renames", "-z", base, "--")
    return sorted({*changed, *git("ls-files", "--others", "--exclude-standard", "-z")})


class Uses:
    """What each file of a checkout imports, runs or names."""

    def __init__(self, root: Path = PROJECT) -> None:
        self.root = root
        folders = (
            "mmvmamba",
            "kernels",
            "tools",
            "tests",
            "configs",
            "docs",
            "requirements",
            ".ci",
        )
        files = [p for folder in folders for p in (root / folder).rglob("*") if p.is_file()]
        hidden = {".mim", "__pycache__", "lib"}
        self.files = {
            p.relative_to(root).as_posix()
            for p in [*files, *root.glob("*.*")]
            if not hidden & set(p.relative_to(root).parts)
        }
        # A name that two files have says too little, unless one of them stands beside its user.
        self._by_name = defaultdict(list)
        for file in self.files:
            self._by_name[Path(file).name].append(file)

    @functools.cached_property
    def tests(self) -> set[str]:
        """All test files."""
        return {file for file in self.files if re.match(r"tests/(.*/)?test_\w+\.py$", file)}

    @functools.cached_property
    def _test_folders(self) -> list[str]:
        return sorted({Path(file).parent.as_posix() for file in self.tests})

    @functools.cache  # noqa: B019 - as short-lived as the process
    def _module(self, name: str, near: str = "") -> str | None:
        """The file of a module, where `near` imports it."""
        path = name.replace(".", "/")
        folders = [Path(near).parent.as_posix(), *ROOTS]
        if near.startswith("tests/") and "." not in name:
            # Some folders have the helpers of others on their path.
            folders += self._test_folders
        for folder in folders:
            for end in (".py", "/__init__.py"):
                file = f"{folder}/{path}{end}".removeprefix("/").removeprefix("./")
                if file in self.files:
                    return file
        return None

    @functools.cache  # noqa: B019 - as short-lived as the process
    def _tree(self, file: str) -> ast.Module:
        return ast.parse((self.root / file).read_text())

    def _defined(self, name: str, attribute: str, near: str) -> str | None:
        """The file that `from name import attribute` ends at, through packages that pass it on."""
        file = self._module(f"{name}.{attribute}", near) or self._module(name, near)
        if file and file.endswith("__init__.py"):
            for node in self._tree(file).body:
                names = node.names if isinstance(node, ast.ImportFrom) and node.module else ()
                if attribute in {alias.asname or alias.name for alias in names}:
                    return self._defined(node.module, attribute, near) or file
        return file

    def _named(self, text: str, near: str) -> Iterator[str]:
        """Files that a text names: a path's end, a module or, in tests, a tool by its stem."""
        for word in re.split(r"[\s'\"=:,;()$`]+", text):
            name = word.rsplit("/", 1)[-1]
            found = [file for file in self._by_name.get(name, ()) if name != "__init__.py"]
            exact = [file for file in found if file.endswith(word.lstrip("./")) and "/" in word]
            beside = [file for file in found if Path(file).parent == Path(near).parent]
            if exact or beside or len(found) == 1:
                yield from (exact or beside or found)
            if re.fullmatch(r"\.\w+", word):
                yield from filter(None, [self._module(word[1:], near)])
            elif re.fullmatch(r"mmvmamba(\.\w+)+|mmvmamba_kernels(\.\w+)+", word):
                yield from filter(None, [self._module(word)])
        if near.startswith("tests/") and re.fullmatch(r"\w+", text):
            yield from (f for f in self._by_name.get(f"{text}.py", ()) if f.startswith("tools/"))

    @functools.cache  # noqa: B019 - as short-lived as the process
    def of(self, file: str) -> frozenset[str]:
        """What a file uses directly."""
        found = set()
        if file.endswith(".py"):
            nodes = list(ast.walk(self._tree(file)))
            documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.Import):
                    found |= {self._module(alias.name, file) for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found |= {self._defined(node.module, a.name, file) for a in node.names}
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= set(() if node in documentation else self._named(node.value, file))
        elif file.endswith((".sh", "run")):
            found |= set(self._named((self.root / file).read_text(), file))
        if file in self.tests:
            folders = Path(file).parents
            found |= {f"{folder.as_posix()}/conftest.py" for folder in folders}
        return frozenset((found & self.files) - {file, OF_ALL_TESTS})

    @functools.cached_property
    def _users(self) -> dict[str, set[str]]:
        users = defaultdict(set)
        for file in self.files:
            if file.endswith((".py", ".sh")) or file == ".ci/run":
                for used in self.of(file):
                    users[used].add(file)
        return users

    def _mirrors(self, file: str) -> set[str]:
        """Test files that have the name of a file, or of the folder of an operator."""
        path = Path(file)
        names = {path.stem} if path.stem not in ("__init__", "api") else set()
        if file.startswith("kernels/mmvmamba_kernels/"):
            names.add(path.parent.name)
        return {t for t in self.tests if Path(t).stem.removeprefix("test_") in names}

    def distances(self, files: Iterable[str]) -> dict[str, int]:
        """Test files that files can affect -> how many imports are between, least first.

        0 stands for a test file that is among the files or has the name of one.
        """
        files = list(files)
        found = dict.fromkeys(files, 0)
        for file in files:
            found |= dict.fromkeys(self._mirrors(file), 0)
            # Sources of the compiled libraries are what builds and calls them is tested with.
            if "/csrc/" in file:
                stem = "test_cuda" if "/cuda/" in file else "test_cpp"
                names = (f"tests/kernels/{stem}.py", f"tests/kernels/{stem}_build.py")
                found |= {test: 0 for test in names if test in self.tests}
                files.extend(f for f in self._by_name["extension.py"] if f not in files)
        edge = files
        distance = 0
        while edge:
            distance += 1
            edge = sorted({user for file in edge for user in self._users[file]} - found.keys())
            found |= dict.fromkeys(edge, distance)
        near = {file: found[file] for file in found if file in self.tests}
        return dict(sorted(near.items(), key=lambda item: (item[1], item[0])))

    def heirs(self, config: str) -> set[str]:
        """Names of the configs that a change to one affects: itself, or an heir per folder."""
        if "_base_" not in config.split("/"):
            return {Path(config).stem}
        heirs, edge = {}, {config}
        while edge:
            users = {
                file
                for file in self.files
                if file.startswith("configs/") and file.endswith(".py") and self.of(file) & edge
            }
            edge = users - set(heirs.values()) - {config}
            for file in sorted(edge):
                if "_base_" not in file.split("/"):
                    heirs.setdefault(Path(file).parent, file)
            edge = {file for file in edge if "_base_" in file.split("/")}
        return {Path(file).stem for file in heirs.values()}


def select(
    changed: Iterable[str], uses: Uses | None = None
) -> tuple[dict[str, set[str] | None], dict[str, int]]:
    """What to run for a change, and what is left out.

    For each changed file the test files that are nearest to it: those that have its name; else
    those that import it, or that import what imports it, and so on, until there are some, and of
    these the ones in its own folder of `tests/` if there are any.

    Returns:
        Test files -> the configs whose tests are wanted of it, None for all tests; and the test
        files that are further away -> how far.
    """
    uses = uses or Uses()
    chosen: dict[str, set[str] | None] = {}
    others: dict[str, int] = {}
    for file in changed:
        if file.startswith("configs/") and file.endswith(".py"):
            names = uses.heirs(file) if file in uses.files else set()
            for test in sorted(t for t in uses.tests if t.startswith("tests/configs/")):
                if names and chosen.get(test, names) is not None:
                    chosen[test] = (chosen.get(test) or set()) | names
        if file == OF_ALL_TESTS:
            others |= dict.fromkeys(uses.tests, 1)
        distances = uses.distances([file])
        folder = f"tests/{'kernels' if file.startswith('kernels/') else Path(file).parent.name}/"
        ranks = {test: (d, d > 0 and not test.startswith(folder)) for test, d in distances.items()}
        for test, distance in distances.items():
            if ranks[test] == min(ranks.values()):
                chosen[test] = None
            else:
                others[test] = min(distance, others.get(test, distance))
    return chosen, {test: others[test] for test in sorted(others.keys() - chosen.keys())}


if __name__ == "__main__":
    affected, further = select(sys.argv[1:] or changed_files())
    for test_file, configs in sorted(affected.items()):
        print(test_file, *sorted(configs or ()))  # noqa: T201
    print(f"and {len(further)} that are further away")  # noqa: T201
