"""The sample data set that the quick start and the tests run on."""

from mmvmamba.datasets.sample_data import (
    SampleDataError,
    SampleDataParams,
    is_complete,
    make_sample_data,
)

__all__ = ["SampleDataError", "SampleDataParams", "is_complete", "make_sample_data"]
