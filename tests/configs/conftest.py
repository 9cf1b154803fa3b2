"""Loading a hundred configs, which inherit from the same few files: each file is parsed once."""

import functools
from copy import deepcopy

import pytest
from mmengine.config import Config


@pytest.fixture(scope="session", autouse=True)
def cached_files():
    """The files under one name are the same all session long; what is read is each caller's own."""
    parse = functools.cache(Config._file2dict)
    with pytest.MonkeyPatch.context() as patch:
        copy = staticmethod(lambda *args, **kwargs: deepcopy(parse(*args, **kwargs)))
        patch.setattr(Config, "_file2dict", copy)
        yield
