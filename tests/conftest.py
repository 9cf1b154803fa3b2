"""What all tests share: the project's folder and a small set of sample data."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's folder."""
    return PROJECT


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """A folder with `coco`, `ADEChallengeData2016` and `imagenet`, a few images each."""
    from mmvmamba.datasets import SampleDataParams, make_sample_data

    root = tmp_path_factory.mktemp("sample")
    make_sample_data(root, SampleDataParams(num_train=4, num_val=2, image_size=96))
    return root
