"""What the recorder of serving makes of repeats."""

import numpy as np
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
    logs = np.log([100, 120, 140])
    assert row["ttft_p50_ms"] == pytest.approx(np.exp(logs.mean()))
    half = 4.3027 * logs.std(ddof=1) / 3**0.5  # t of 2 degrees
    assert row["ttft_p50_ms_low"] == pytest.approx(np.exp(logs.mean() - half), rel=1e-4)
    assert row["within"] == 1 and row["within_low"] == row["within_high"] == 1
