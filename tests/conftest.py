"""What all tests share: the project's folder, a small set of sample data and the options below."""

import gc
import sys
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "tests"))

import affected  # noqa: E402

CHOSEN = pytest.StashKey[dict[str, set[str] | None]]()


def pytest_addoption(parser):
    parser.addoption(
        "--changed",
        nargs="?",
        const="HEAD",
        metavar="REV",
        help="only the test files nearest to what differs from a commit, by default the last one",
    )


def pytest_configure(config):
    if config.getoption("--changed") is None:
        return
    try:
        changed = affected.changed_files(config.getoption("--changed"), config.rootpath)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[CHOSEN], left_out = affected.select(changed, affected.Uses(config.rootpath))
    if not hasattr(config, "workerinput"):
        sys.stdout.write(
            f"-- {len(changed)} changed files: {len(config.stash[CHOSEN])} test files, "
            f"{len(left_out)} left out that are further away "
            "(the whole suite: bash tools/run_tests.sh)\n"
        )


def pytest_ignore_collect(collection_path, config):
    chosen = config.stash.get(CHOSEN, None)
    if chosen is not None and collection_path.name.startswith("test_"):
        return collection_path.relative_to(config.rootpath).as_posix() not in chosen or None
    return None


def pytest_collection():
    """There is no garbage yet, and looking for it takes a fifth of the imports' time."""
    gc.disable()


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """Of the tests of configs keeps those of the chosen ones, where they are told apart."""
    chosen = config.stash.get(CHOSEN, None) or {}
    for file, names in chosen.items():
        of_file = [item for item in items if item.nodeid.startswith(f"{file}::")]
        wanted = [item for item in of_file if any(name in item.nodeid for name in names or ())]
        if wanted:
            left = [item for item in of_file if item not in wanted]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


def pytest_sessionfinish(session):
    """A change that no test file is near to is no failure."""
    if CHOSEN in session.config.stash and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter, config):
    """Says how long each folder of tests took, so that growth is noticed."""
    seconds, numbers = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                parts = report.nodeid.partition("::")[0].split("/")
                folder = "/".join(parts[:2]) if len(parts) > 2 else parts[0]
                seconds[folder] += report.duration
                numbers[folder] += report.when == "call"
    if seconds:
        terminalreporter.section("seconds of tests per folder")
    for folder, duration in seconds.most_common():
        terminalreporter.write_line(f"{duration:8.1f}  {numbers[folder]:5d} tests  {folder}")


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's folder."""
    return PROJECT


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Nothing that is there before a file's tests is looked through for garbage again.

    PyTorch and OpenMMLab are a million objects: up to a third of the tests' time went into that.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quickened():
    """See `quick`."""
    # The operators' tests need no mmengine.
    if "mmengine.config" in sys.modules:
        import quick

        quick.quicken()


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """A folder with `coco`, `ADEChallengeData2016` and `imagenet`, a few images each."""
    from mmvmamba.datasets import SampleDataParams, make_sample_data

    root = tmp_path_factory.mktemp("sample")
    make_sample_data(root, SampleDataParams(num_train=4, num_val=2, image_size=96))
    return root


@pytest.fixture(autouse=True)
def default_scope():
    """Leaves mmengine's default scope as it was: workers run the tests in any order."""

    def scopes() -> dict:
        # Not imported for this alone: it takes seconds.
        registry = sys.modules.get("mmengine.registry")
        return registry.DefaultScope._instance_dict if registry else {}

    before = dict(scopes())
    yield
    after = scopes()
    after.clear()
    after.update(before)
