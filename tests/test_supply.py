"""What is installed: bounds and windows are one fact each, and every download has a hash."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmvmamba import compat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parents[1]
REQUIREMENTS = PROJECT / "requirements"
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCKS = ("stack", "lowest", "newest", "mmcv", "onedl", "onedl-sources", "uv")


def named(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by name, from lines that may be comments."""
    found = (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def extras(onedl: bool) -> Iterator[str]:
    """What the extras ask for: those of OneDL's packages, or all others but `deploy`."""
    for name, requirements in METADATA["project"]["optional-dependencies"].items():
        if name.endswith("-onedl") == onedl and name != "deploy":
            yield from requirements


def declared() -> dict[str, Requirement]:
    """Every requirement with bounds: of the package, its extras and what it leaves to the user."""
    left = (REQUIREMENTS / "bounds.in").read_text().splitlines()
    return named([*METADATA["project"]["dependencies"], *extras(onedl=False), *left])


def locked(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """The requirements of a lock file, each with its hashes."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        yield Requirement(requirement), hashes


def pins(name: str) -> dict[str, list[Version]]:
    """The versions of a lock file, of which a package may have one per Python."""
    found: dict[str, list[Version]] = {}
    for requirement, _ in locked(name):
        [pin] = requirement.specifier
        found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_download_is_pinned_and_has_a_hash(lock):
    requirements = list(locked(lock))
    assert requirements
    for requirement, hashes in requirements:
        assert [pin.operator for pin in requirement.specifier] == ["=="], requirement
        assert "*" not in str(requirement.specifier), requirement
        assert requirement.url is None, requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    # No address and no option that would bring one: the user's own index is asked.
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("    --hash=", ""), re.MULTILINE)


def test_locks_hold_all_that_is_asked_for_within_the_bounds():
    left_out = named((REQUIREMENTS / "overrides.txt").read_text().splitlines())
    asked = named((REQUIREMENTS / "stack.in").read_text().splitlines())
    bounds = declared()
    for lock, names in (("stack", asked | bounds), ("lowest", bounds), ("newest", bounds)):
        found = pins(lock)
        assert names.keys() - left_out.keys() <= found.keys(), lock
        for name in bounds:
            for version in found[name]:
                assert bounds[name].specifier.contains(version), (lock, name, version)
    for name, requirement in asked.items():
        assert all(requirement.specifier.contains(version) for version in pins("stack")[name])


def bound(requirement: Requirement, operator: str) -> Version:
    """The version that stands behind an operator, which occurs once."""
    [version] = [s.version for s in requirement.specifier if s.operator == operator]
    return Version(version)


@pytest.mark.parametrize("name", sorted(declared()))
def test_both_bounds_are_the_versions_that_were_tested(name):
    """The lower bound begins the lowest version that was run; the upper ends the newest series."""
    requirement = declared()[name]
    [lowest], [newest] = pins("lowest")[name], pins("newest")[name]
    release = bound(requirement, ">=").release
    assert lowest.release[: len(release)] == release
    release = bound(requirement, "<").release
    *series, last = newest.release[: len(release)]
    assert (*series, last + 1) == release


def test_what_exports_is_what_the_stack_has():
    """It was run in one set of versions; the lowest Python has no file of some of them."""
    for name, requirement in named(METADATA["project"]["optional-dependencies"]["deploy"]).items():
        newest = max(pins("stack")[name])
        assert bound(requirement, ">=").release == newest.release[:2]
        *series, last = newest.release[:2]
        assert bound(requirement, "<").release == (*series, last + 1)
        assert all(requirement.specifier.contains(version) for version in pins("newest")[name])


def onedl_pins() -> dict[str, list[Version]]:
    """All of OneDL's stack: what is downloaded, and what is built from sources."""
    return pins("onedl") | pins("onedl-sources")


def test_onedls_stack_is_the_other_with_its_packages():
    found, other = onedl_pins(), pins("stack")
    assert {name for name in found if name.startswith("onedl-")} == compat.ONEDL.keys() - {"torch"}
    assert not {names[0] for names in compat.MODULES.values()} & found.keys()
    for name in found.keys() & other.keys():
        assert found[name] == other[name], name
    left_out = {names[0] for names in compat.MODULES.values()}
    asked = named((REQUIREMENTS / "stack.in").read_text().splitlines())
    assert asked.keys() - left_out <= found.keys()
    # Each extra has its twin.
    twins = METADATA["project"]["optional-dependencies"]
    assert [f"{name}-onedl" in twins for name in ("det", "seg", "cls")] == [True] * 3


@pytest.mark.parametrize("name", sorted(compat.ONEDL.keys() - {"torch"}))
def test_onedls_windows_are_what_was_tested(name):
    """One version, the lowest, to the end of its series; said alike by package and advice."""
    window, command = compat.ONEDL[name]
    [tested] = onedl_pins()[name]
    *series, last = tested.release[:2]
    assert window == SpecifierSet(f">={tested},<{'.'.join(map(str, [*series, last + 1]))}")
    requirement = named(list(extras(onedl=True))).get(name)
    if name == "onedl-mmcv":
        assert command.endswith(f" {name}=={tested}")
    else:
        assert str(Requirement(command.split('"')[1]).specifier) == str(window)
    # As OpenMMLab's, these two are left to the user.
    assert (requirement is None) == (name in ("onedl-mmcv", "onedl-mmengine"))
    if requirement:
        assert requirement.specifier == window


def test_windows_at_run_time_are_those_of_the_package():
    bounds = declared()
    for name, (works, command) in compat.STACK.items():
        window = works & compat.TESTED.get(name, SpecifierSet())
        if name == "mmcv":
            [version] = pins("mmcv")["mmcv"]
            assert window.contains(version)
            assert f"mmcv=={version}" in command
            continue
        advised = Requirement(command.split('"')[1])
        assert (advised.name, advised.specifier) == (name, window)
        if name == "setuptools":
            # Older ones build no package, but do what is needed at run time.
            assert window == SpecifierSet(f"<{bound(bounds[name], '<')}")
        else:
            assert window == bounds[name].specifier, name
    for name, (_, command, _) in compat.ADVISED.items():
        assert Requirement(command.split('"')[1]).name == name
    needed = named(METADATA["build-system"]["requires"])
    assert needed["setuptools"].specifier == bounds["setuptools"].specifier


def test_the_set_up_installs_nothing_without_a_hash():
    text = (PROJECT / "tools/setup_env.sh").read_text().replace("\\\n", " ")
    commands = [
        line for line in text.splitlines() if re.search(r"\bpip (install|download|wheel) ", line)
    ]
    assert len(commands) == 6
    for command in commands:
        # Files that were built here, or this checkout, are the only others.
        local = "--no-index" in command or "$source" in command or command.endswith("-e .")
        assert "--no-deps" in command
        assert "--require-hashes" in command or local, command
        # Build requirements are those of the lock.
        assert "--no-build-isolation" in command or ":all:" in command or "--no-index" in command


ADVISORIES = [
    {"name": "one", "version": "1.0", "vulns": []},
    {
        "name": "two",
        "version": "2.0",
        "vulns": [
            {"id": "PYSEC-1", "aliases": ["CVE-2024-12044"], "fix_versions": []},
            {"id": "PYSEC-2", "aliases": [], "fix_versions": ["2.1"]},
        ],
    },
    {"name": "three", "skip_reason": "not found"},
]


def audit(folder: Path, program: str, **variables: str) -> str:
    """What the audit prints with another pip-audit; it must not fail, whatever happens."""
    (folder / "pip_audit.py").write_text(program)
    done = subprocess.run(
        [sys.executable, PROJECT / "tools/misc/audit.py", REQUIREMENTS / "mmcv.txt"],
        env={**os.environ, "PYTHONPATH": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_audit_reports_what_is_known_and_what_was_judged(tmp_path):
    answer = f"import json, sys\nprint(json.dumps({{'dependencies': {ADVISORIES}}}))\nsys.exit(1)"
    out = audit(tmp_path, answer)
    assert "2 packages, 2 known vulnerabilities" in out
    assert re.search(r"two 2\.0 +PYSEC-1, CVE-2024-12044 +- +in SECURITY\.md", out)
    assert re.search(r"two 2\.0 +PYSEC-2 +2\.1 +not yet", out)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (f"print({{'dependencies': {ADVISORIES[2:]}}})".replace("'", '"'), "no advisories"),
        ("raise OSError('no route to host')", "OSError: no route to host"),
        ("import sys\nsys.exit(3)", "exit status 3"),
    ],
)
def test_an_audit_without_an_answer_says_so(tmp_path, program, reason):
    if program.startswith("print"):
        program = f"print('''{program[6:-1]}''')"
    out = audit(tmp_path, program)
    assert "could not ask, so nothing is known" in out
    assert reason in out


def test_the_real_audit_without_a_network_says_so(tmp_path):
    pytest.importorskip("pip_audit")
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, PROJECT / "tools/misc/audit.py", REQUIREMENTS / "mmcv.txt"],
        env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "could not ask, so nothing is known" in done.stdout
    assert "Connection" in done.stdout
