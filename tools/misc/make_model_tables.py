#!/usr/bin/env python
"""Writes the model tables of the READMEs from the metafiles that model-index.yml lists.

Each table stands between two marker lines, which stay; all other text is left alone.
"""

import argparse
import re
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- model table: begin (tools/misc/make_model_tables.py writes it from metafile.yml) -->"
END = "<!-- model table: end -->"
# The models whose results stand for their family in the project's README.
MAIN_MODEL = re.compile(r"VMamba-([TSB])(,|$)")


class TableError(Exception):
    """Raised when a README has no place for its table, or a metafile cannot be read."""


def read_metafiles(project: Path) -> dict[Path, list[dict]]:
    """Reads the metafiles that model-index.yml lists, in its order.

    Returns:
        The models of each metafile, by the family's folder.
    """
    index = yaml.safe_load((project / "model-index.yml").read_text(encoding="utf-8"))
    families = {}
    for name in index["Import"]:
        path = project / name
        families[path.parent] = yaml.safe_load(path.read_text(encoding="utf-8"))["Models"]
    return families


def family_table(models: list[dict]) -> list[str]:
    """Makes the table of a family's README: a row per model, a column per metric that occurs."""
    names = [name for model in models for name in metrics(model)]
    names = list(dict.fromkeys(names))
    sources = [source(model) for model in models]
    heads = ["model", "params (M)", "FLOPs (G)", *names]
    if any(sources):
        heads.append("source of the results")
    rows = []
    for model, where in zip(models, sources, strict=True):
        about = model["Metadata"]
        found = metrics(model)
        files = f"[config]({Path(model['Config']).name})"
        if "Weights" in model:
            files += f", [weights]({model['Weights']})"
        flops = f"{about['FLOPs'] / 1e9:.4g}" if "FLOPs" in about else "-"
        row = [about["Model"], f"{about['Parameters'] / 1e6:.1f}", flops]
        row += [str(found.get(name, "-")) for name in names]
        rows.append([*row, *([where or "-"] if any(sources) else []), files])
    return markdown([*heads, "files"], rows)


def overview_table(families: dict[Path, list[dict]], project: Path) -> list[str]:
    """Makes the table of the project's README: a row per family."""
    rows = []
    for folder, models in families.items():
        title = (folder / "README.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        main: dict[str, dict[str, float]] = {}
        for model in models:
            size = MAIN_MODEL.match(model["Metadata"]["Model"])
            if size:
                # The first is the one of the shorter schedule.
                main.setdefault(size[1], metrics(model))
        results = "; ".join(
            f"{name} {' / '.join(str(main[size][name]) for size in 'TSB')}"
            for name in main.get("T", ())
            if all(name in main.get(size, ()) for size in "TSB")
        )
        released = sum("Weights" in model for model in models)
        link = f"[{folder.name}]({folder.relative_to(project)}/README.md)"
        rows.append([link, title, str(len(models)), str(released or "-"), results or "-"])
    reported = "VMamba-T / -S / -B, as the paper reports"
    heads = ["family", "what", "configs", "with released weights", reported]
    return markdown(heads, rows)


def metrics(model: dict) -> dict[str, float]:
    """All metrics of a metafile's entry by name."""
    return {k: v for result in model.get("Results", ()) for k, v in result["Metrics"].items()}


def source(model: dict) -> str:
    """Where an entry's results come from; '' if it has none."""
    return "; ".join(dict.fromkeys(result["Source"] for result in model.get("Results", ())))


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def with_table(text: str, table: list[str], name: str) -> str:
    """Puts a table between the markers of a README.

    Raises:
        TableError: If the two markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise TableError(f"{name} must have these two lines once each, in order:\n{BEGIN}\n{END}")
    return "\n".join([before + begin, "", *table, "", end + after])


def make_tables(project: Path) -> dict[Path, str]:
    """Makes every README's text with its current table.

    Raises:
        TableError: If a README has no markers, or a metafile or README is missing or incomplete.
    """
    try:
        families = read_metafiles(project)
        tables = {folder / "README.md": family_table(models) for folder, models in families.items()}
        tables[project / "README.md"] = overview_table(families, project)
        return {
            path: with_table(path.read_text(encoding="utf-8"), table, str(path))
            for path, table in tables.items()
        }
    except (OSError, yaml.YAMLError) as error:
        raise TableError(str(error)) from error
    except KeyError as error:
        raise TableError(f"a metafile's entry lacks {error}") from error


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write the READMEs' model tables from the metafiles."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a table is not current"
    )
    parser.add_argument("--project", type=Path, default=PROJECT, help="the checkout's folder")
    options = parser.parse_args(arguments)
    try:
        tables = make_tables(options.project)
    except TableError as error:
        sys.exit(f"error: {error}")
    stale = [path for path, text in tables.items() if path.read_text(encoding="utf-8") != text]
    if options.check:
        if stale:
            sys.exit(
                f"error: not current: {', '.join(map(str, stale))}. "
                "Fix: python tools/misc/make_model_tables.py"
            )
        return
    for path in stale:
        path.write_text(tables[path], encoding="utf-8")


if __name__ == "__main__":
    main()
