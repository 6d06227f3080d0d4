"""measurements.py：记下的数留几位。"""

import math

import pytest

from nlp_common.base import measurements


@pytest.mark.parametrize(
    "value, kept",
    [(0, 0), (3, 3), (0.12345678, 0.123457), (1234.5678912, 1234.567891), (8.8817841970012523e-16, 8.88e-16)],
)
def test_small_numbers_are_not_written_as_zero(value, kept):
    assert measurements._rounded(value) == kept
    assert measurements._rounded(-value) == -kept


def test_nan_stays_nan():
    assert math.isnan(measurements._rounded(math.nan))
