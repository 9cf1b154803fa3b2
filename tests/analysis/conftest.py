"""Runs the command lines of tools/analysis_tools in the test's own process."""

import importlib.util
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def analysis_tool(project, monkeypatch, tmp_path, capsys) -> Callable:
    """From a tool's name to a function that runs it on the CPU, in an empty folder.

    That takes the arguments, and returns the exit status and what was printed.
    """

    def load(name: str, columns: int = 80) -> Callable[..., tuple[int | str | None, str]]:
        path = project / "tools/analysis_tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", str(columns))

        def run(*arguments: str):
            monkeypatch.setattr(sys, "argv", [path.name, "--device", "cpu", *arguments])
            try:
                tool.main()
                status = 0
            except SystemExit as end:
                status = end.code
            return status, capsys.readouterr().out

        return run

    return load
