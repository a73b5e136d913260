"""The pictures of the serving notebook can be drawn from invented rows."""

import matplotlib.pyplot as plt
import pandas as pd

from qtutor.figures import serving as figures


def test_pictures():
    table = pd.DataFrame([dict(state="successful", start=i * 0.1, first=i * 0.1 + 0.2, last=i * 0.1 + 0.5,
                               ttft_ms=200.0) for i in range(6)])  # fmt: skip
    low = figures.timeline(table, 4).axes[1]
    assert max(low.lines[0].get_ydata()) == 3  # 0.3 s of decoding, one more every 0.1 s
    assert len(figures.loops({"open": table, "closed": table}).axes[0].lines) == 2
    rows = pd.DataFrame([dict(type=name, rate_per_s=rate) | {column + end: 5.0 * rate for end in ("", "_low", "_high")
                         for column in ("ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "goodput_per_s")}
                         for name in figures.STYLE for rate in (1.0, 2.0)])  # fmt: skip
    assert len(figures.curves(rows, 500, 50).axes) == 3
    plt.close("all")
