"""The command lines of tools/analysis_tools, in the test's own process."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def load_tool(project) -> Callable[[str], ModuleType]:
    """From a tool's name to a new module of it."""

    def load(name: str) -> ModuleType:
        path = project / "tools/analysis_tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        return tool

    return load


@pytest.fixture
def analysis_tool(load_tool, monkeypatch, tmp_path, capsys) -> Callable:
    """From a tool's name to a function that runs it on the CPU, in an empty folder.

    That takes the arguments, and returns the exit status and what was printed.
    """

    def load(name: str, columns: int = 80) -> Callable[..., tuple[int | str | None, str]]:
        tool = load_tool(name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", str(columns))

        def run(*arguments: str):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", *arguments])
            try:
                tool.main()
                status = 0
            except SystemExit as end:
                status = end.code
            return status, capsys.readouterr().out

        return run

    return load
