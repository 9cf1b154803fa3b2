"""Reports the known vulnerabilities of locked packages, and which of them SECURITY.md judges.

pip-audit asks the advisory service of the package index. This is a report: whatever it finds, or
cannot find out, the exit status is 0.

usage: python tools/misc/audit.py requirements/stack.txt requirements/mmcv.txt requirements/uv.txt
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

JUDGEMENTS = Path(__file__).resolve().parents[2] / "SECURITY.md"
# Of the whole audit: half a minute is usual.
SECONDS = 180


class UnansweredError(RuntimeError):
    """The advisory service gave no answer; the message says why."""


def ask(files: list[Path]) -> list[dict]:
    """Asks what is known of the packages that are pinned in requirement files.

    Returns:
        A dict per package that the service knows: `name`, `version` and `vulns`, each of them with
        `id`, `aliases` and `fix_versions`.

    Raises:
        UnansweredError: If there was no answer, or none about any of the packages.
    """
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip"]
    command += ["--format=json", "--aliases=on", "--desc=off", "--progress-spinner=off"]
    for file in files:
        command += ["--requirement", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnansweredError(f"no answer within {SECONDS} s") from error
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError as error:
        said = [line for line in done.stderr.splitlines() if any(map(str.isalpha, line))]
        reason = said[-1][:200] if said else f"exit status {done.returncode}"
        raise UnansweredError(reason) from error
    # pip-audit takes an index without advisories for one on which nothing is wrong.
    answered = [package for package in packages if "skip_reason" not in package]
    if not answered:
        raise UnansweredError(f"the package index has no advisories, asked for {len(packages)}")
    return answered


def report(console: Console, packages: list[dict], judgements: str) -> None:
    """Prints a line per vulnerability.

    Args:
        console: Where to.
        packages: What `ask` returns.
        judgements: A text that names the advisories that were looked into.
    """
    judged = set(re.findall(r"[\w-]+", judgements))
    table = Table("package", "advisory", "fixed in", "judged", box=None, pad_edge=False)
    for package in packages:
        for found in package["vulns"]:
            names = [found["id"], *found["aliases"]]
            table.add_row(
                f"{package['name']} {package['version']}",
                ", ".join(names),
                ", ".join(found["fix_versions"]) or "-",
                "in SECURITY.md" if judged.intersection(names) else "not yet",
            )
    console.print(f"   {len(packages)} packages, {table.row_count} known vulnerabilities")
    if table.row_count:
        console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="requirement files with hashes")
    files = parser.parse_args().files
    console = Console(soft_wrap=True)
    console.print(f"-- known vulnerabilities of {' and '.join(map(str, files))}")
    try:
        report(console, ask(files), JUDGEMENTS.read_text() if JUDGEMENTS.is_file() else "")
    except UnansweredError as error:
        console.print(f"   could not ask, so nothing is known: {escape(str(error))}")


if __name__ == "__main__":
    main()
