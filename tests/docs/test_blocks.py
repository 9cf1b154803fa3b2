"""Every block of code in README and docs is run, or says why not and names what exists."""

import ast
import json
import re
import subprocess
import sys

import pytest
import warm
from pages import FOLLOWED, PROJECT, Block, blocks, pages

BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if not block.reason]
# Runs the blocks of Python of pages: a config is loaded, and its model takes an image; all else is
# executed, with one namespace a page.
DRIVER = """
import json, sys
import torch
import mmvmamba
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

namespaces = {}
for number, (page, line, text) in enumerate(json.load(open(sys.argv[1]))):
    print(f"{page}, line {line}", flush=True)
    if text.startswith("_base_"):
        file = f"config_{number}.py"
        open(file, "w").write(text)
        cfg = Config.fromfile(file)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model).eval()
        with torch.no_grad():
            maps = model.extract_feat(torch.zeros(1, 3, 64, 64))
        assert len(maps) == 5, len(maps)
        assert cfg.optim_wrapper.optimizer.type == "AdamW"
    else:
        code = compile(text, f"{page}, line {line}", "exec")
        exec(code, namespaces.setdefault(page, {"__name__": "__main__"}))
print("all ran")
"""


def python(*arguments: str, cwd) -> str:
    """Runs this Python, as `warm.run` does; returns what it printed."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = warm.run([sys.executable, *arguments], cwd=cwd, timeout=240, **streams)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_there_are_blocks_of_both_kinds():
    """So that a slip of the pattern is no success."""
    assert len([block for block in RUN if block.language == "python"]) >= 8
    assert len([block for block in BLOCKS if block.language == "bash"]) >= 30
    assert {"docs/own_data.md", "docs/finetune_classifier.md"} <= FOLLOWED.keys()
    assert {"README.md", "docs/get_started.md", *FOLLOWED} <= set(pages())


def test_blocks_of_python_run(tmp_path):
    found = [b for b in RUN if b.language == "python"]
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps([(b.page, b.line, b.text) for b in found]))
    printed = python("-c", DRIVER, str(file), cwd=tmp_path)
    assert printed.endswith("all ran\n")
    assert all(f"{b.page}, line {b.line}\n" in printed for b in found)


def test_commands_run(tmp_path):
    (tmp_path / "tools").symlink_to(PROJECT / "tools")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    number = 0
    for block in RUN:
        for command in block.commands() if block.language == "bash" else ():
            if command[:3] == ["python", "-m", "pytest"]:
                # The suite runs them.
                tests = [word for word in command if word.startswith("tests/")]
                assert tests, f"{block.page}, line {block.line} names no tests"
                assert all((PROJECT / test).exists() for test in tests), command
            else:
                assert command[0] == "python", f"mark this block as not run, or run it: {block}"
                python(*command[1:], cwd=tmp_path)
                number += 1
    assert number >= 1
    assert (tmp_path / "scan_patterns.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """From a tool to the options that its help names."""
    known: dict[str, set[str]] = {}

    def read(tool: str) -> set[str]:
        if tool not in known:
            printed = python(PROJECT / tool, "--help", cwd=tmp_path_factory.mktemp("help"))
            known[tool] = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", printed))
        return known[tool]

    return read


def check_command(command: list[str], block: Block, options) -> None:
    """A command that is not run names scripts, configs, tests and options that exist."""
    where = f"{block.page}, line {block.line}: {' '.join(command)}"
    for word in command:
        if re.match(r"(tools|configs|tests|kernels|requirements|demo)/", word):
            assert (PROJECT / word).exists(), where
    tool = command[1] if command[0] in ("python", "bash") and len(command) > 1 else ""
    if tool.startswith("tools/") and tool.endswith(".py"):
        known = options(tool)
    elif re.match(r"tools/(dist|slurm)_(train|test)\.sh", tool):
        known = options(f"tools/{tool.rpartition('_')[2].removesuffix('.sh')}.py")
    else:
        return
    unknown = {w.partition("=")[0] for w in command if w.startswith("--")} - known
    assert not unknown, f"{where}: no option {unknown}"


def test_commands_that_are_not_run_name_what_exists(options):
    checked = 0
    for block in BLOCKS:
        if not block.reason or block.language != "bash":
            continue
        commands = block.commands()
        for command in commands:
            benchmark = ["python", "tools/analysis_tools/benchmark.py"]
            if command[0] == "$BENCHMARK":
                command = [*benchmark, *command[1:]]  # noqa: PLW2901 (the command that it is)
            check_command(command, block, options)
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("page", pages())
def test_files_that_are_named_in_a_text_exist(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    named = re.findall(
        r"`(?:python |bash )?((?:tools|tests|configs|requirements)/[\w./-]+\.\w+)", text
    )
    if page == "docs/analysis.md":
        scripts = re.findall(r"[|,] `(\w+\.py)[ `]", text)
        assert len(scripts) >= 12
        named += [f"tools/analysis_tools/{script}" for script in scripts]
    missing = [name for name in named if not (PROJECT / name).exists()]
    assert not missing, f"{page} names {missing}"


def literals() -> list[str]:
    """The strings of the project's code, with '...' in place of values, and its shell scripts."""
    found = []
    for folder in ("mmvmamba", "kernels/mmvmamba_kernels", "tools"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            if ".mim" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                values = [getattr(part, "value", None) for part in parts]
                text = "".join(v if isinstance(v, str) else "..." for v in values)
                if len(text) > 3:
                    found.append(text)
    return [*found, *((PROJECT / "tools" / n).read_text() for n in ("setup_env.sh", "common.sh"))]


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    text = (PROJECT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    ours = text.partition("\n## Messages of other packages")[0]
    messages = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    assert len(messages) >= 25
    known = "\0".join(literals())
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = r"[^\0]*?".join(parts)
        # What stands between two parts may be joined from several strings.
        found = re.search(pattern, known) or all(re.search(part, known) for part in parts)
        assert found, f"no message like {message!r} is left in the code"


def test_the_readme_is_short(project):
    lines = (project / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140


def test_the_versions_agree(project):
    from mmvmamba import __version__

    citation = (project / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert f"\n## [{__version__}]" in (project / "CHANGELOG.md").read_text()


def test_the_driver_notices_a_failure(tmp_path):
    (tmp_path / "blocks.json").write_text('[["page", 3, "assert 1 == 2"]]')
    with pytest.raises(AssertionError, match="page, line 3"):
        python("-c", DRIVER, "blocks.json", cwd=tmp_path)
