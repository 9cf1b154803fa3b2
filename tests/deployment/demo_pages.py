"""The page of `python -m mmvmamba.demo`, as tests use it."""

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mmvmamba import demo


@contextmanager
def served(folder: Path, model: Path | None) -> Iterator[str]:
    """The address of the page, with a model beside it."""
    demo.assemble(folder, model)
    with demo.server_of(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class Page:
    """The page, as a person uses it.

    Args:
        page: Of Playwright.
        address: Where it is served.
    """

    def __init__(self, page, address: str):
        self.page, self.faults = page, []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.faults.append(said.text))
        self.address = address
        self.load()

    def load(self) -> None:
        """Opens the page, anew if it was."""
        self.done = 0
        self.page.goto(self.address)
        self.settle()

    def settle(self) -> None:
        """Waits until what was begun has ended."""
        self.done += 1
        self.page.wait_for_selector(f'body[data-done="{self.done}"]', state="attached")

    def open(self, *paths: Path) -> None:
        self.page.set_input_files("#model-files", list(paths))
        self.settle()

    def show(self, path: Path) -> None:
        """Opens a picture."""
        self.page.set_input_files("#picture-file", path)
        self.settle()

    def drop(self, *paths: Path) -> None:
        """Drags files over the page, beside all that is on it, and drops them."""
        files = [
            {"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
            for path in paths
        ]
        dragged = self.page.evaluate_handle(
            """(files) => {
                const dragged = new DataTransfer();
                for (const { name, data } of files) {
                    const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
                    dragged.items.add(new File([bytes], name));
                }
                return dragged;
            }""",
            files,
        )
        self.page.dispatch_event("html", "dragover", {"dataTransfer": dragged})
        assert "dropping" in self.page.get_attribute("html", "class")
        self.page.dispatch_event("html", "drop", {"dataTransfer": dragged})
        self.settle()
        assert "dropping" not in self.page.get_attribute("html", "class")

    def numbers(self, output: str) -> np.ndarray:
        """A result of the model."""
        found = self.state(
            f"[Array.from(state.results.{output}.data), state.results.{output}.shape]"
        )
        return np.reshape(found[0], found[1])

    def text(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def state(self, code: str):
        """What an expression of the page's `state` gives."""
        return self.page.evaluate(f"import('/app.js').then(({{ state }}) => {code})")

    def call(self, module: str, code: str, given=None):
        """What a function of a module, which may take `given`, gives."""
        return self.page.evaluate(f"(given) => import('/{module}').then((module) => {code})", given)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
