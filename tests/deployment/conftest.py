"""The browser, and the page in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import demo_pages
import pytest

from mmvmamba import demo
from mmvmamba.engine.errors import UsageError

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def runtime() -> Path:
    """ONNX Runtime for browsers."""
    try:
        return demo.fetch_runtime()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser(runtime):
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright is installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(runtime, tmp_path_factory) -> Iterator[str]:
    """Where the page is served, without a model."""
    with demo_pages.served(tmp_path_factory.mktemp("page"), None) as address:
        yield address


@pytest.fixture(scope="module")
def opened(browser, address) -> demo_pages.Page:
    """The page of a file's tests, which compiles the runtime once."""
    return demo_pages.Page(browser.new_page(), address)


@pytest.fixture
def page(opened) -> Iterator[demo_pages.Page]:
    """The page, with what earlier tests opened on it; it must report no fault."""
    opened.faults.clear()
    yield opened
    # What the page fetches first may not be there.
    assert [fault for fault in opened.faults if "404" not in fault] == []
