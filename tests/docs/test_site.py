"""The site: a strict build, what it holds, and how it looks in a browser."""

import functools
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from pages import PROJECT

griffe = pytest.importorskip("griffe", reason="the extra 'docs' is not installed")
pytest.importorskip("material", reason="the extra 'docs' is not installed")
sys.path.insert(0, str(PROJECT / "tools/misc"))
site_hooks = pytest.importorskip("site_hooks")

PACKAGES = ("mmvmamba", "mmvmamba_kernels")
# What a class has for its base class, whose documentation is that of the base.
INHERITED = re.compile(r"forward|backward|extra_repr|train|eval|build|load_state_dict")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=PROJECT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_asks_for_nothing_elsewhere(site):
    built = {path.relative_to(site).as_posix() for path in site.rglob("index.html")}
    for page in [*site_hooks.PAGES, *(p.name for p in (PROJECT / "docs").glob("*.md"))]:
        assert (
            f"{page.removesuffix('.md')}/index.html" if page != "index.md" else page[:-3] + ".html"
        ) in built
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]+)"', text)
        assert not loaded, f"{path} loads {loaded}"


def test_the_search_finds_words_of_the_guides(site):
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    for word, page in (("resume", "reliability/"), ("labelme", "own_data/"), ("VMamba", "api/")):
        assert any(page in one["location"] and word in one["text"] + one["title"] for one in found)


def reference(site: Path) -> set[str]:
    """The names that the API reference explains, from the inventory that Sphinx reads too."""
    content = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(content.split(b"\n", 4)[4]).decode()
    return {line.split(" ", 1)[0] for line in listed.splitlines()}


def test_the_reference_has_all_public_names(site):
    """What packages export, and what configs can name."""
    import mmvmamba_kernels
    from mmvmamba import models

    named = reference(site)
    ends = {name.rpartition(".")[2] for name in named}
    assert not set(mmvmamba_kernels.__all__) - ends
    assert not {*models.__all__, *models.NEED_UPSTREAM} - ends
    sources = [path.read_text() for path in (PROJECT / "mmvmamba/engine").glob("*.py")]
    pattern = r"@\w+\.register_module\(\)\nclass (\w+)"
    registered = {name for source in sources for name in re.findall(pattern, source)}
    assert len(registered) >= 7
    assert not registered - ends


def undocumented(package: str) -> list[str]:
    """Public classes, functions and methods of a package without a docstring."""
    paths = [str(PROJECT), str(PROJECT / "kernels")]
    found = []

    def visit(thing) -> None:
        for name, member in thing.members.items():
            if name.startswith("_") or member.is_alias:
                continue
            if member.is_module or member.is_class:
                visit(member)
            wanted = member.is_class or member.is_function
            if member.is_function and thing.is_class and INHERITED.fullmatch(name):
                wanted = not thing.bases
            # A kernel's arguments and purpose are those of its launcher.
            if wanted and not member.docstring and not _is_kernel(member):
                found.append(member.path)

    visit(griffe.load(package, search_paths=paths, allow_inspection=False))
    return found


def _is_kernel(member) -> bool:
    marks = [str(one.value) for one in getattr(member, "decorators", ())]
    return any("jit" in mark or "overload" in mark for mark in marks)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package):
    assert undocumented(package) == []


def test_undocumented_names_are_noticed(tmp_path, monkeypatch):
    (tmp_path / "bare.py").write_text("def hidden_from_readers():\n    return 1\n")
    monkeypatch.setattr(sys.modules[__name__], "PROJECT", tmp_path)
    assert undocumented("bare") == ["bare.hidden_from_readers"]


@pytest.mark.parametrize(
    ("target", "resolved"),
    [
        ("../kernels/README.md#maths", "[a](kernels.md#maths)"),
        ("../configs/mask_rcnn/README.md", "[a](configs/mask_rcnn.md)"),
        ("own_data.md", "[a](own_data.md)"),
        ("https://example.com", "[a](https://example.com)"),
        # No page: a file of the repository, whose address is not known.
        ("../tools/train.py", "a"),
    ],
)
def test_links_are_resolved(target, resolved, caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="analysis.md"))
    markdown = f"[a]({target})\n\n```\n[a]({target})\n```\n"
    expected = f"{resolved}\n\n```\n[a]({target})\n```\n"
    assert site_hooks.on_page_markdown(markdown, page) == expected
    assert not caplog.records


def test_a_broken_link_is_a_warning(caplog):
    """Which a strict build counts."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri="analysis.md"))
    site_hooks.on_page_markdown("[a](../mmvmamba/none.py)", page)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("mkdocs")
    assert "docs/analysis.md links to ../mmvmamba/none.py" in record.getMessage()


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def address(site):
    """Where the site is served, on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_site_in_a_browser(site, address, tmp_path):
    """No page scrolls sideways, pictures load, the search finds, and both colour schemes work."""
    playwright = pytest.importorskip("playwright.sync_api")
    pictures = Path(os.environ.get("SITE_PICTURES", tmp_path))
    names = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                page = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                for name in names if scheme == "light" else ("get_started", "how_it_works"):
                    page.goto(f"{address}/{name}/")
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    assert wide <= width, f"{name} is {wide} pixels wide at {width}"
                    broken = page.evaluate(
                        "Promise.all([...document.images].map(i => {i.loading = 'eager'; "
                        "return i.decode().then(() => '', () => i.src)}))"
                        ".then(all => all.filter(Boolean))"
                    )
                    assert not broken, f"{name}: {broken}"
                    if pictures != tmp_path:
                        file = f"{name.replace('/', '_')}-{scheme}-{width}.png"
                        page.screenshot(path=pictures / file, full_page=width == 1280)
                colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 300) == (scheme == "dark")
                page.close()
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.fill("input.md-search__input", "resume")
        page.wait_for_selector(".md-search-result__item a")
        results = page.locator(".md-search-result__item").all_inner_texts()
        assert any("Reliability" in text or "Interrupted" in text for text in results)
        browser.close()
