"""What the tests of own data share."""

import gc
from copy import deepcopy
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvmamba.engine import cli

# By the configs' texts.
_LOADED: dict[str, Config] = {}


@pytest.fixture(scope="session")
def quick_collections():
    """Takes what is there out of garbage collections: mmengine collects for every data set."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def quick_configs(monkeypatch, quick_collections):
    """Loads equal configs once, and leaves them out of logs: the two take most of a start."""
    load = cli._load

    def load_once(name: str) -> Config:
        text = Path(name).read_text()
        if text not in _LOADED:
            _LOADED[text] = load(name)
        return deepcopy(_LOADED[text])

    monkeypatch.setattr(cli, "_load", load_once)
    monkeypatch.setattr(Config, "pretty_text", "")
