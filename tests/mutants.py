"""Mutants: faults put into the code one at a time, to see whether the tests notice.

    python tests/mutants.py make
    python tests/mutants.py run --out FILE [--tree CHECKOUT] [--jobs 2]
    python tests/mutants.py run --out FILE --only ID --tests 'TRITON_INTERPRET=1 tests/... -k name'
    python tests/mutants.py table FILE

`make` writes data/mutants.json: places chosen by a seed, more in larger files. Each is kept as a
piece of the file and what stands there instead, so that it is found again where code has moved.
There each mutant also has the test that notices it ("tests", of an earlier run) or why none does
("reason"). `run` runs that test, or those that are nearest to the code where there is none. It goes
on where it was interrupted, and works on copies of the last commit of a checkout, in processes that
are forked from one that has imported what takes long.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import affected

HERE = Path(__file__).resolve().parent
MUTANTS = HERE / "data" / "mutants.json"
SEED = 12
NUMBERS = {".py": 154, ".sh": 8, "csrc": 8}
FOLDERS = ("kernels/mmvmamba_kernels", "mmvmamba", "tools")
# What tests compare with, the version, how sample objects look, and scripts that were written anew
# with the suite that is to be compared.
LEFT_OUT = ("testing.py", "version.py", "sample_objects.py", "setup_env.sh", "run_tests.sh")
# Imported before forking: what takes seconds and is not of this project.
WARM = ("torch", "numpy", "mmengine.runner", "mmcv.ops", "mmdet.apis", "mmseg.apis")
WARM += ("mmpretrain.apis", "matplotlib.pyplot", "pytest", "hypothesis", "rich.console")
# Folders whose tests start processes; their turn comes after the others at the same distance.
HEAVY = ("tests/integration/", "tests/distributed/", "tests/configs/")

PAIRS = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!="}
PAIRS |= {"Is": "is", "IsNot": "is not", "In": "in", "NotIn": "not in", "And": "and", "Or": "or"}
PAIRS |= {"Add": "+", "Sub": "-", "Mult": "*", "Div": "/", "FloorDiv": "//", "Pow": "**"}
OTHERS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not"}
OTHERS |= {"is not": "is", "in": "not in", "not in": "in", "and": "or", "or": "and", "+": "-"}
OTHERS |= {"-": "+", "*": "+", "/": "*", "//": "*", "**": "*"}
SPOKEN = re.compile(
    "print|log|warn|info|debug|write|fail|error|add_argument|rule|title|close_matches|bare|task|"
    "console|sleep|mkdir",
    re.IGNORECASE,
)
# Speed and looks are no tests' subject.
OF_NO_RESULT = re.compile(
    r"warps|stages|block_|timeout|figsize|dpi|stacklevel|width|color|alpha|size|help|priority|style",
    re.IGNORECASE,
)
SHELL = {" == ": " != ", " != ": " == ", "[[ -n ": "[[ -z ", "[[ -z ": "[[ -n ", " && ": " || "}
SHELL |= {
    "exit 2": "exit 0",
    "exit 1": "exit 0",
    " -x ": " -d ",
    ":-1}": ":-2}",
    "shift 2": "shift",
}
CPP = {" + ": " - ", " - ": " + ", " * ": " + ", " < ": " <= ", " && ": " || ", " += ": " -= "}


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Finder(ast.NodeVisitor):
    """Collects (operator, start, end, replacement) of a Python file, in offsets of its text."""

    def __init__(self, text: str, constants: tuple[type, ...]) -> None:
        self.text = text
        self.constants = constants
        self.found: list[tuple[str, int, int, str]] = []
        lengths = [len(line.encode()) for line in text.splitlines(keepends=True)]
        self.starts = [0, *itertools.accumulate(lengths)]
        self.visit(ast.parse(text))

    def _offset(self, line: int, column: int) -> int:
        return len(self.text.encode()[: self.starts[line - 1] + column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._offset(node.lineno, node.col_offset)
        return start, self._offset(node.end_lineno, node.end_col_offset)

    def _swap(self, name: str, left: ast.AST, operator: ast.AST, right: ast.AST) -> None:
        old = PAIRS.get(type(operator).__name__)
        start, end = self._span(left)[1], self._span(right)[0]
        if old and old in self.text[start:end]:
            self.found.append((name, start, end, self.text[start:end].replace(old, OTHERS[old], 1)))

    def _put(self, name: str, node: ast.AST, new: str) -> None:
        self.found.append((name, *self._span(node), new))

    def visit_Compare(self, node):
        pairs = zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)
        for left, operator, right in pairs:
            if not (isinstance(right, ast.Constant) and right.value == "__main__"):
                self._swap("comparison", left, operator, right)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        text = any(isinstance(n, ast.JoinedStr | ast.Constant) for n in (node.left, node.right))
        if not text or not isinstance(node.op, ast.Mod | ast.Add):
            self._swap("arithmetic", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in itertools.pairwise(node.values):
            self._swap("logic", left, node.op, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            self._put("not", node, f"bool({ast.get_source_segment(self.text, node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if not isinstance(node.value, self.constants):
            return
        if isinstance(node.value, bool):
            self._put("constant", node, str(not node.value))
        elif isinstance(node.value, int) and -1 <= node.value <= 64:
            self._put("constant", node, str(node.value + 1))
        elif isinstance(node.value, float):
            self._put("constant", node, f"{2 * node.value or 1.0!r}")

    def visit_If(self, node):
        condition = ast.get_source_segment(self.text, node.test)
        if "__name__" in condition or "TYPE_CHECKING" in condition:
            return
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self._put("branches", node.test, f"not ({condition})")
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.visit_If(node)

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Call):
            return
        if not SPOKEN.search(ast.unparse(node.value.func)):
            self._put("call", node, "None")
            self.generic_visit(node)

    def visit_Call(self, node):
        if not SPOKEN.search(ast.unparse(node.func)):
            self.generic_visit(node)

    def visit_Raise(self, node):
        self._put("raise", node, "pass")

    def visit_keyword(self, node):
        if not OF_NO_RESULT.search(node.arg or ""):
            self.generic_visit(node)

    def visit_Assign(self, node):
        if not OF_NO_RESULT.search(ast.unparse(node.targets[0])):
            self.generic_visit(node)

    def visit_AnnAssign(self, node):
        if node.value and not OF_NO_RESULT.search(ast.unparse(node.target)):
            self.visit(node.value)

    def visit_arguments(self, node):
        for default in [*node.defaults, *filter(None, node.kw_defaults)]:
            self.visit(default)

    def visit_FunctionDef(self, node):
        # Neither decorators nor annotations.
        if node.name not in ("__repr__", "__str__"):
            self.visit(node.args)
            for statement in node.body:
                self.visit(statement)

    def visit_ClassDef(self, node):
        for statement in node.body:
            self.visit(statement)

    def visit_JoinedStr(self, node):
        """What is said, not what is done."""


def _replacements(text: str, table: dict[str, str]) -> Iterator[tuple[str, int, int, str]]:
    """Mutations of a text's lines of code by a table of old and new."""
    start = 0
    spoken = re.compile(r"^\s*(#|//|\*|printf|echo|template|using|static_assert|local )|fail |<<")
    for line in text.splitlines(keepends=True):
        if not spoken.search(line):
            for old, new in table.items():
                if line.count(old) == 1:
                    begin = start + line.index(old)
                    yield "text", begin, begin + len(old), new
        start += len(line)


def candidates(path: Path) -> list[tuple[str, int, int, str]]:
    """All mutations of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        # Another constant makes device code only slower, or a sample picture only another one.
        constants = () if "tl.load" in text else (int, float)
        return Finder(text, (int,) if "datasets" in path.parts else constants).found
    return list(_replacements(text, SHELL if path.suffix == ".sh" else CPP))


def snippet(text: str, start: int, end: int, new: str) -> tuple[str, str]:
    """The shortest run of whole lines that holds a place and occurs once, and what it becomes."""
    first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    last = len(text) if last < 0 else last
    before = True
    while text.count(text[first:last]) > 1:
        if before and first:
            first = text.rfind("\n", 0, first - 1) + 1
        else:
            last = text.find("\n", last + 1)
            last = len(text) if last < 0 else last
        before = not before
    return text[first:last], text[first:start] + new + text[end:last]


def make(root: Path) -> list[dict[str, str]]:
    """The list of mutants, of a checkout."""
    files = [p for folder in FOLDERS for p in sorted((root / folder).rglob("*")) if p.is_file()]
    kinds = defaultdict(dict)
    for path in files:
        kind = "csrc" if "csrc" in path.parts else path.suffix
        if kind in NUMBERS and path.name not in LEFT_OUT and ".mim" not in path.parts:
            found = candidates(path)
            if found:
                kinds[kind][path] = found
    mutants = []
    for kind, by_file in kinds.items():
        total = sum(map(len, by_file.values()))
        seen = 0
        for path, found in by_file.items():
            # Rounded so that the sum is right.
            number = round((seen + len(found)) * NUMBERS[kind] / total)
            number -= round(seen * NUMBERS[kind] / total)
            seen += len(found)
            name = path.relative_to(root).as_posix()
            chosen = random.Random(f"{SEED} {name}").sample(found, min(number, len(found)))
            text = path.read_text()
            for operator, start, end, new in sorted(chosen, key=lambda place: place[1]):
                old, changed = snippet(text, start, end, new)
                line = text.count("\n", 0, start) + 1
                number_of_line = f"{path.stem}-{line}-{start - text.rfind(chr(10), 0, start)}"
                where = Path(name).parent.name
                mutants.append(
                    {
                        "id": f"{where}.{number_of_line}",
                        "operator": operator,
                        "file": name,
                        "find": old,
                        "replace": changed,
                    }
                )
    return mutants


def find(mutant: dict[str, str], root: Path) -> Path | None:
    """The file of a mutant in a checkout: where it was, else the one file that has its piece."""
    path = root / mutant["file"]
    if path.is_file() and path.read_text().count(mutant["find"]) == 1:
        return path
    others = [
        other
        for folder in FOLDERS
        for other in sorted((root / folder).rglob(f"*{path.suffix}"))
        if ".mim" not in other.parts and other.read_text().count(mutant["find"]) == 1
    ]
    return others[0] if len(others) == 1 else None


class Recorder:
    """A plugin of pytest that writes down how many tests ran, the last, and the first failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, object] = {"ran": 0}

    def note(self, **seen: object) -> None:
        self.seen |= seen
        self.path.write_text(json.dumps(self.seen))

    def pytest_runtest_logstart(self, nodeid):
        self.note(runs=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and not report.skipped:
            self.note(ran=self.seen["ran"] + 1)
        self._failed(report)

    def pytest_collectreport(self, report):
        self._failed(report)

    def _failed(self, report):
        if report.failed and "failed" not in self.seen:
            self.note(failed=report.nodeid)


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class Outcome(NamedTuple):
    """Of a run of tests."""

    passed: bool
    late: bool
    by: str
    """The test that failed or ran last."""
    ran: int
    """Tests that were not skipped."""
    seconds: float
    """Of CPU."""


class Workplace:
    """A copy of a checkout's last commit, in which mutants are made and tests run."""

    def __init__(self, tree: Path, folder: Path) -> None:
        folder.mkdir()
        self.tree = tree
        self.root = folder / "tree"
        self.record = folder / "record.json"
        self.log = folder / "log"
        self._times = itertools.count(int(time.time()))
        git = ["git", "-C", str(tree), "worktree", "add", "--quiet", "--detach"]
        subprocess.run([*git, str(self.root), "HEAD"], check=True)
        # What git ignores and an installation has.
        for path in (tree / "kernels").rglob("*.so"):
            target = self.root / path.relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if (tree / "mmvmamba/.mim").is_dir():
            shutil.copytree(tree / "mmvmamba/.mim", self.root / "mmvmamba/.mim", symlinks=True)
        self.uses = affected.Uses(self.root)

    def remove(self) -> None:
        git = ["git", "-C", str(self.tree), "worktree", "remove", "--force", str(self.root)]
        subprocess.run(git, check=True)

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Compiled modules are told apart by whole seconds and by the length of their source.
        moment = next(self._times)
        os.utime(path, (moment, moment))

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        return {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "-1"}

    def run(self, tests: str, seconds: float) -> Outcome:
        """Runs tests up to the first failure.

        Args:
            tests: Arguments of pytest, as a shell takes them.
            seconds: Of CPU, about. Twice as many by the clock, and 30, are the limit.
        """
        self.record.unlink(missing_ok=True)
        process = os.fork()
        if not process:
            try:
                self._test(tests)
            finally:
                os._exit(70)
        # On a machine with other work everything takes longer by the clock.
        crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        deadline = time.monotonic() + (2 * seconds + 30) * crowd
        late = False
        try:
            while True:
                ended, _, usage = os.wait4(process, os.WNOHANG)
                if ended:
                    break
                if time.monotonic() > deadline:
                    late = True
                    _end_group(process)
                time.sleep(0.05)
        finally:
            # What tests leave behind too, and the test itself where this run is interrupted.
            _end_group(process)
        seen = json.loads(self.record.read_text()) if self.record.exists() else {}
        # Tests that end the process fail too; none collected or all deselected is no failure.
        passed = seen.get("status") in (0, 5) and "failed" not in seen
        by = seen.get("failed") or seen.get("runs") or tests
        used = usage.ru_utime + usage.ru_stime
        return Outcome(passed, late and "failed" not in seen, by, seen.get("ran", 0), used)

    def _test(self, tests: str) -> None:
        import pytest

        os.setsid()
        with self.log.open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(self.root)
        _, options = _words(tests)
        os.environ.update(self.environment())
        sys.path[:] = [str(self.root), str(self.root / "kernels"), *sys.path[1:]]
        sys.modules.pop("affected", None)
        options += ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        recorder = Recorder(self.record)
        recorder.note(status=int(pytest.main(options, plugins=[recorder])))
        os._exit(0)


def _words(tests: str) -> tuple[dict[str, str], list[str]]:
    """Variables and arguments of a selection of tests."""
    words = shlex.split(tests)
    number = next(i for i, word in enumerate(words) if not re.match("[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:number]), words[number:]


def nearest(place: Workplace, file: str) -> list[str]:
    """The test files that a file can affect, nearest first, those that start processes last."""
    distances = place.uses.distances([file])
    return sorted(distances, key=lambda t: (distances[t], t.startswith(HEAVY), t))


def judge(
    mutant: dict[str, str],
    place: Workplace,
    seconds: float,
    chosen: list[str],
    clean: dict[str, bool],
) -> dict[str, object]:
    """Runs chosen tests, else those that a mutant can reach, until one notices it."""
    result = {"id": mutant["id"], "file": mutant["file"]}
    path = find(mutant, place.root)
    if path is None:
        return {**result, "verdict": "gone"}
    tests = chosen or nearest(place, path.relative_to(place.root).as_posix())
    original = path.read_text()
    mutated = original.replace(mutant["find"], mutant["replace"])
    used, ran = 0.0, 0
    try:
        place.write(path, mutated)
        if "csrc" in path.parts and "cuda" not in path.parts:
            command = [sys.executable, "-m", "mmvmamba_kernels.build"]
            done = subprocess.run(
                command, cwd=place.root, env=place.environment(), capture_output=True, check=False
            )
            if done.returncode:
                return {**result, "verdict": "killed", "by": "the compiler"}
        for number, test in enumerate(tests):
            if used >= seconds and not chosen:
                left = len(tests) - number
                return {**result, "verdict": "undecided", "seconds": round(used), "left": left}
            outcome = place.run(test, seconds)
            used += outcome.seconds
            ran += outcome.ran
            if outcome.passed:
                continue
            # The one test must fail alone too, and pass without the mutant, or it says nothing.
            variables, _ = _words(test)
            by = shlex.join([*(f"{k}={v}" for k, v in variables.items()), outcome.by])
            if by != test and place.run(by, seconds).passed:
                continue
            if by not in clean:
                place.write(path, original)
                clean[by] = place.run(by, seconds).passed
                place.write(path, mutated)
            if clean[by]:
                late = {"late": True} if outcome.late else {}
                return {**result, "verdict": "killed", "by": by, "seconds": round(used), **late}
        return {**result, "verdict": "survived", "seconds": round(used), "ran": ran}
    finally:
        place.write(path, original)


def read_results(path: Path) -> dict[str, dict]:
    """Results by mutant, from a file with one in each line."""
    if not path.exists():
        return {}
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def run(options: argparse.Namespace) -> None:
    mutants = [
        mutant
        for mutant in json.loads(MUTANTS.read_text())
        if (mutant["id"] in options.only if options.only else "reason" not in mutant)
    ]
    done = read_results(options.out)
    mutants = [mutant for mutant in mutants if mutant["id"] not in done]
    say(f"{len(mutants)} mutants to run, {len(done)} already done")
    # To an end with everything that this began.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Triton is imported with the variable that it reads then.
    groups = defaultdict(list)
    for mutant in mutants:
        tests = options.tests or [mutant.get("tests", "tests")]
        groups[tuple(_words(tests[0])[0].items())].append(mutant)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        places = [
            Workplace(options.tree.resolve(), Path(folder, str(n))) for n in range(options.jobs)
        ]
        try:
            for variables, group in groups.items():
                _run_group(group, places, dict(variables), options)
        finally:
            for place in places:
                place.remove()


def _run_group(
    mutants: list[dict[str, str]],
    places: list[Workplace],
    variables: dict[str, str],
    options: argparse.Namespace,
) -> None:
    workers = []
    for number, place in enumerate(places):
        worker = os.fork()
        if not worker:
            try:
                os.environ.update(variables)
                for module in WARM:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(module)
                _work(mutants[number :: len(places)], place, options)
            finally:
                # What the interpreter does at its end is the parent's.
                os._exit(0)
        workers.append(worker)
    try:
        for worker in workers:
            os.waitpid(worker, 0)
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(worker, signal.SIGTERM)
                os.waitpid(worker, 0)


def _work(mutants: list[dict[str, str]], place: Workplace, options: argparse.Namespace) -> None:
    clean: dict[str, bool] = {}
    for number, mutant in enumerate(mutants):
        chosen = options.tests or ([mutant["tests"]] if "tests" in mutant else [])
        result = judge(mutant, place, options.seconds, chosen, clean)
        with options.out.open("a") as out:
            out.write(json.dumps(result) + "\n")
        said = [f"{number + 1}/{len(mutants)}", mutant["id"], result["verdict"]]
        say(*said, result.get("by", ""), f"{result.get('seconds', 0)} s")


def table(results: dict[str, dict]) -> str:
    """Markdown: for each part of the code what the tests kill, and what survives for a reason."""
    columns = ("mutants", "killed", "survive for a reason", "survived", "undecided", "gone")
    rows = defaultdict(Counter)
    for mutant in json.loads(MUTANTS.read_text()):
        file = mutant["file"]
        part = "C++ and CUDA" if "/csrc/" in file else f"`{file.split('/')[0]}/`"
        part = "shell scripts" if file.endswith(".sh") else part
        verdict = results.get(mutant["id"], {"verdict": "undecided"})["verdict"]
        for row in (part, "all"):
            rows[row]["mutants"] += 1
            rows[row]["survive for a reason" if "reason" in mutant else verdict] += 1
    columns = [column for column in columns if rows["all"][column]]
    lines = [f"| code | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for part in sorted(rows, key=lambda row: (row == "all", row.strip("`"))):
        lines.append(f"| {part} | {' | '.join(str(rows[part][c]) for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make")
    running = commands.add_parser("run")
    running.add_argument("--tree", type=Path, default=affected.PROJECT)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--only", nargs="+", metavar="ID")
    running.add_argument(
        "--tests",
        action="append",
        metavar="SELECTION",
        help="arguments of pytest, instead of the tests that the list names",
    )
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--seconds", type=float, default=60, help="of CPU for each mutant")
    commands.add_parser("table").add_argument("results", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        mutants = make(affected.PROJECT)
        MUTANTS.write_text(json.dumps(mutants, indent=1) + "\n")
        say(f"{len(mutants)} mutants: {dict(Counter(m['operator'] for m in mutants))}")
    elif options.command == "run":
        run(options)
    else:
        say(table(read_results(options.results)))


if __name__ == "__main__":
    main()
