"""The explorer of number formats: it shows what the library computes, and every control redraws it."""

import ipywidgets
import pytest
import torch

from qtutor.figures import number_formats


@pytest.mark.parametrize("value", [-7.99, -0.3, 0.0, 2.7, 8.0])
def test_the_table_says_what_torch_rounds_to(value):
    table = number_formats.error_table(("E4M3", "E5M2"), value).set_index("format")
    for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
        rounded = torch.tensor(value).to(dtype).item()
        assert table.loc[name, "nearest"] == f"{rounded:.5g}"
        assert float(table.loc[name, "error"]) == pytest.approx(rounded - value, rel=0.01, abs=1e-9)


def test_every_control_redraws_and_no_format_is_hidden():
    row, image, table = number_formats.format_explorer().children
    chosen, (scale, value) = row.children[0], row.children[1].children
    assert isinstance(chosen, ipywidgets.SelectMultiple) and chosen.rows >= len(chosen.options)
    assert set(chosen.value) <= set(chosen.options)
    seen = {(bytes(image.value), table.value)}
    for control, new in ((chosen, ("INT8",)), (value, 3.3), (scale, "log")):
        control.value = new
        seen.add((bytes(image.value), table.value))
    assert len(seen) == 4 and "INT8" in table.value
    value.value = -1.0  # nothing to show on a log axis: no line, and no error
