"""What the recorder of serving makes of repeats."""

import pandas as pd
import pytest

from qtutor.rigs import serving
from tools import record_serving


def test_intervals_over_repeats():
    def table(ttft):
        return pd.DataFrame([dict(loop="open", load=2.0, state="successful", start=float(i), last=i + 0.5,
                                  output_tokens=4, ttft_ms=ttft, itl_ms=5.0) for i in range(4)])  # fmt: skip

    tables = [table(100.0), table(120.0), table(140.0)]
    parts = [serving.summary(one, 500, 50) for one in tables]
    (row,) = record_serving.with_intervals(parts, serving.summary(pd.concat(tables), 500, 50))
    assert row["rate_per_s"] == 2 and row["repeats"] == 3 and row["requests"] == 12 and "load" not in row
    assert row["ttft_p50_ms"] == pytest.approx(120)
    assert row["ttft_p50_ms_low"] == pytest.approx(120 - 4.3027 * 20 / 3**0.5, abs=0.01)  # t of 2 degrees, sd 20
