"""Loading a hundred configs: upstream's metafiles are parsed once instead of once per config."""

import functools

import pytest
from mmengine.config import utils


@pytest.fixture(scope="session", autouse=True)
def cached_metafiles():
    """mmengine looks every `package::` name up in all of that package's metafiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load", functools.cache(utils.load))
        yield
