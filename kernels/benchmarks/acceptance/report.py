"""The run as text and as a section of a Markdown file, from the JSON file alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from acceptance.run import LEFT_OUT, MET, MISSED, WRONG


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; numbers have three digits, what is missing a dash."""
    lines = [header, ("---", *("--:" for _ in header[1:])), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def summary(record: dict) -> str:
    """How many targets were met, in a line."""
    verdicts = [v["verdict"] for v in record["verdicts"]]
    counts = {kind: verdicts.count(kind) for kind in (MET, MISSED, WRONG, LEFT_OUT)}
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def markdown(record: dict) -> str:
    """The whole section."""
    about = record["about"]
    parts = [
        f"```bash\n{about['command']}\n```",
        f"{about['date']}: "
        + ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("command", "date"))
        + f". Targets: {summary(record)}.",
    ]
    if "core" in record:
        parts.append(_core(record["core"]))
    if "states" in record:
        found = record["states"]
        forward, both = found["ms"]
        parts.append(
            f"{found['states']} states at {'x'.join(map(str, found['shape']))}: forward "
            f"{forward:.3g} ms, forward and backward {both:.3g} ms; the backward pass takes "
            f"{_cell(found['temporary_maps'])} maps of x beside what it returns."
        )
    if "models" in record:
        parts += _models(record["models"])
    if "backbones" in record:
        parts.append(_backbones(record["backbones"]))
    if "compiling" in record:
        parts.append(_compiling(record["compiling"]))
    if "values" in record:
        rows = record["values"]
        right = sum(row["right"] for row in rows)
        parts.append(f"Values against float64: {right} of {len(rows)} cases within tolerance.")
    others = [v for v in record["verdicts"] if v["verdict"] != MET]
    if others:
        head = ("not met", "verdict", "found", "target")
        rows = [
            (f"{v['section']}: {v['name']}", v["verdict"], v["found"], v["target"]) for v in others
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _core(rows: Sequence[dict]) -> str:
    head = (
        "shape (B, H, W, D)",
        "official: forward, both",
        "whole core: forward, both",
        "scan and norm: forward, both",
        "the same, modelled",
    )
    pair = "{}, {}".format
    cells = [
        [row["shape"].replace(",", ", ")]
        + [
            pair(*map(_cell, row[key] or (None, None)))
            for key in ("official", "whole", "scan", "modelled")
        ]
        for row in rows
    ]
    note = (
        "Milliseconds, bfloat16, d_state 1. 'Official' is VMamba's CUDA extension, measured on an "
        "H200 before this project; 'modelled' is what kernels/benchmarks/gpu_model predicts for an "
        "H200, without matrix products and sums of partials."
    )
    return f"{note}\n\n{table(head, cells)}"


def _models(rows: Sequence[dict]) -> list[str]:
    found = []
    for passes in dict.fromkeys(row["case"]["passes"] for row in rows):
        chosen = [row for row in rows if row["case"]["passes"] == passes]
        names = list(dict.fromkeys(row["model"] for row in chosen))
        modes: dict[str, dict[str, dict]] = {}
        for row in chosen:
            case = row["case"]
            modes.setdefault(f"{case['precision']}, {case['execution']}", {})[row["model"]] = row
        shape = "x".join(str(chosen[0]["case"][key]) for key in ("batch", "height", "width"))
        head = (f"{passes}, {shape}, images/s (peak GB)", *names)
        cells = [(mode, *(_speed(of.get(name)) for name in names)) for mode, of in modes.items()]
        found.append(table(head, cells))
    return found


def _backbones(rows: Sequence[dict]) -> str:
    head = ("backbone alone, bfloat16", "ms", "peak GB")
    cells = []
    for row in rows:
        case = row["case"]
        shape = "x".join(str(case[key]) for key in ("batch", "height", "width"))
        ms = None if row["failure"] else 1e3 * row["seconds"]
        cells.append((f"{case['passes']}, {case['execution']}, {shape}", ms, row["peak_gb"]))
    return table(head, cells)


def _speed(row: dict | None) -> str:
    if row is None or row["failure"]:
        return "failed" if row else "-"
    peak = "" if row["peak_gb"] is None else f" ({row['peak_gb']:.2f})"
    return f"{row['images_per_second']:.0f}{peak}"


def _compiling(found: dict) -> str:
    text = "Distinct kernels of VMamba-T: " + ", ".join(
        f"{number} ({name})" for name, number in found["kernels"].items()
    )
    if "seconds" in found:
        text += (
            f". {found['compiled']} compiled in parallel in {found['seconds']:.0f} s; "
            f"{found['new_sizes']} more for images of other sizes"
        )
    return text + "."
