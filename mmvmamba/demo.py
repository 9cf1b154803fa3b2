"""Shows an exported model in the browser: `python -m mmvmamba.demo model.onnx`. See `--help`.

The page (`demo/web`) is static. What stands here puts it into a folder with ONNX Runtime for
browsers and the model, and serves that folder to this machine's browser.
"""

import argparse
import base64
import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.project import project_folder

RUNTIME = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJm"
    "g8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
"""Of the package's archive, as npm has it."""

RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page loads of the package's `dist`."""

QUICK_START = Path("work_dirs/quickstart")
QUICK_START_CONFIG = "configs/sample/mask-rcnn_vmamba-sample_coco.py"
MODEL = "model.onnx"
"""What the page calls the model that lies beside it, in its folder `model`."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmvmamba.demo",
        description="Show an exported model in the browser, which runs it: classes, labels or "
        "boxes, and how much each position contributes to a clicked one.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="an ONNX file of tools/deployment/export.py, with --activation-maps for the maps; "
        "without it, the detector of the quick start, if that has run",
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address alone")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="serve nothing; write all files to this folder, for a web server of your own",
    )
    parser.add_argument(
        "--fetch", action="store_true", help=f"download {RUNTIME} {VERSION}, and do nothing else"
    )
    return parser.parse_args(arguments)


def cache_folder() -> Path:
    """Where what is downloaded is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmvmamba"


def fetch_runtime() -> Path:
    """Downloads ONNX Runtime for browsers with npm, unless it was before.

    Returns:
        The folder with `RUNTIME_FILES`.

    Raises:
        UsageError: If it cannot be had, or is not what its hash says.
    """
    folder = cache_folder() / f"{RUNTIME}-{VERSION}"
    if all((folder / name).is_file() for name in RUNTIME_FILES):
        return folder
    archive = cache_folder() / f"{RUNTIME}-{VERSION}.tgz"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        if not archive.is_file():
            archive = _download(Path(temporary))
        _check(archive)
        _extract(archive, Path(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        Path(temporary, "dist").rename(folder)
    return folder


def _download(folder: Path) -> Path:
    npm = shutil.which("npm")
    by_hand = f"or put {RUNTIME}-{VERSION}.tgz, npm's archive, into {cache_folder()}."
    if npm is None:
        raise UsageError(
            f"the page needs {RUNTIME}, which npm downloads: install npm (Node.js), {by_hand}"
        )
    done = subprocess.run(
        [npm, "pack", f"{RUNTIME}@{VERSION}", "--silent"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.split("\n") + done.stdout.split("\n")
        reason = next(filter(None, map(str.strip, lines)), f"exit status {done.returncode}")
        raise UsageError(
            f"npm cannot download {RUNTIME} {VERSION} ({reason}): look at the network, {by_hand}"
        )
    return folder / done.stdout.split()[-1]


def _check(archive: Path) -> None:
    kind, _, expected = INTEGRITY.partition("-")
    found = base64.b64encode(hashlib.new(kind, archive.read_bytes()).digest()).decode()
    if found != expected:
        raise UsageError(
            f"{archive.name} is not {RUNTIME} {VERSION}: its {kind} is {found}, not {expected}. "
            "Remove it where it lies, or ask the registry that npm is set up for."
        )


def _extract(archive: Path, folder: Path) -> None:
    (folder / "dist").mkdir()
    with tarfile.open(archive) as content:
        for name in RUNTIME_FILES:
            with content.extractfile(f"package/dist/{name}") as source:
                (folder / "dist" / name).write_bytes(source.read())


def assemble(folder: Path, model: Path | None) -> None:
    """Writes the page, the runtime and a model to a folder.

    Args:
        folder: The folder; files of the same names are replaced.
        model: An ONNX file, with what lies beside it; None for a page without one.

    Raises:
        UsageError: If the model or its JSON is missing, or the runtime cannot be had.
    """
    files = {} if model is None else _files_of(model)
    runtime = fetch_runtime()
    shutil.copytree(project_folder() / "demo/web", folder, dirs_exist_ok=True)
    shutil.copytree(runtime, folder / "ort", dirs_exist_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model").mkdir()
    for name, path in files.items():
        shutil.copyfile(path, folder / "model" / name)


def _files_of(model: Path) -> dict[str, Path]:
    """A model's files, by the names that the page asks for."""
    if model.suffix != ".onnx":
        raise UsageError(
            f"{model}: the page runs ONNX files, which end in .onnx. Export one: "
            "python tools/deployment/export.py CONFIG CHECKPOINT model.onnx --activation-maps"
        )
    record = model.with_name(f"{model.name}.json")
    if not model.is_file():
        raise UsageError(f"{model} does not exist (working directory: {Path.cwd()}).")
    if not record.is_file():
        raise UsageError(f"{record} is missing: copy it along with {model.name}, or export anew.")
    scans = _scans_of(model)
    files = {MODEL: model, f"{MODEL}.json": record}
    return files | ({"model.scans.onnx": scans} if scans.is_file() else {})


def _scans_of(model: Path) -> Path:
    """As `mmvmamba.deployment.record.scans_path`, whose import takes seconds."""
    return model.with_suffix(".scans.onnx")


def quick_start_model() -> Path | None:
    """The quick start's detector, exported; None if the quick start has not run.

    Raises:
        UsageError: If it cannot be exported.
    """
    trained = QUICK_START / "trained"
    if not trained.is_file():
        return None
    checkpoint = QUICK_START / trained.read_text().strip()
    model = QUICK_START / MODEL
    # What an export writes last: one that was interrupted leaves the model without it.
    last = _scans_of(model)
    if last.is_file() and last.stat().st_mtime > checkpoint.stat().st_mtime:
        return model
    tell(f"Exporting the quick start's detector to {model}, in two to three minutes.")
    tool = project_folder() / "tools/deployment/export.py"
    command = [QUICK_START_CONFIG, checkpoint, model, "--activation-maps"]
    done = subprocess.run([sys.executable, tool, *command], check=False)
    if done.returncode:
        raise UsageError("the quick start's detector could not be exported, see above.")
    return model


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the page wants it, without a line for each file."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        # Browsers refuse modules and WebAssembly of other types, which a system may give them.
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Adds what lets WebAssembly have threads, and keeps old models out of the cache."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_) -> None:
        """Says nothing."""


def server_of(folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of a folder, for this machine alone.

    Raises:
        UsageError: If the port is taken.
    """
    handler = functools.partial(Handler, directory=str(folder))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port {port} cannot be used ({error}): leave it out.") from error


def tell(text: str) -> None:
    """Prints a line, at once: a pipe would otherwise wait for more."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(text)
    console.file.flush()


def show(options: argparse.Namespace) -> None:
    """Runs a parsed command line."""
    if options.fetch:
        tell(f"{RUNTIME} {VERSION}: {fetch_runtime()}")
        return
    model = options.model or quick_start_model()
    if model is None:
        tell(
            "No model was given, and the quick start has not run here (bash tools/quickstart.sh). "
            "Open one on the page."
        )
    if options.out:
        try:
            assemble(options.out, model)
        except OSError as error:
            raise UsageError(f"--out {options.out} cannot be written: {error}.") from error
        tell(f"{options.out}: the page, for any web server.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        assemble(Path(temporary), model)
        with server_of(Path(temporary), options.port) as server:
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            tell(f"{address}  (Ctrl-C ends it)")
            if not options.no_browser:
                webbrowser.open(address)
            server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        show(parse_arguments(arguments))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        tell("")


if __name__ == "__main__":
    main()
