"""What all tests share: the project's folder and a small set of sample data."""

import functools
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's folder."""
    return PROJECT


@pytest.fixture(scope="session", autouse=True)
def cached_lookups():
    """Where a `package::` config lies is looked up once.

    For every such name, mmengine imports a package anew and reads all metafiles of the other: a
    tenth of a second, several times per config.
    """
    # The operators' tests need no mmengine.
    if "mmengine.config" not in sys.modules:
        yield
        return
    from mmengine.config import Config, utils

    look_up = Config._get_cfg_path
    cached = functools.cache(look_up)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load", functools.cache(utils.load))
        patch.setattr(
            Config,
            "_get_cfg_path",
            staticmethod(
                lambda name, child: cached(name, "") if "::" in name else look_up(name, child)
            ),
        )
        yield


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """A folder with `coco`, `ADEChallengeData2016` and `imagenet`, a few images each."""
    from mmvmamba.datasets import SampleDataParams, make_sample_data

    root = tmp_path_factory.mktemp("sample")
    make_sample_data(root, SampleDataParams(num_train=4, num_val=2, image_size=96))
    return root
