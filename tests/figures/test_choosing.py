"""The decision table and its widget show what decide() found."""

import pytest

from qtutor import QtutorError, llamacpp
from qtutor.decide import hardware
from qtutor.decide.choosing import Need, decide
from qtutor.figures import choosing

pytestmark = pytest.mark.skipif(not llamacpp.available()[0], reason=llamacpp.available()[1])


def test_the_table_says_what_the_decision_says():
    decision = decide(Need(model="Llama-2-70B", users=8, max_loss=0.005, keep_free_gib=2))
    page = choosing.table(decision).to_html()
    assert decision.options[0].name in page and "GiB" in page and "nan" not in page
    assert page == choosing.table(decision).to_html()


@pytest.mark.slow
def test_every_control_of_the_widget_redraws():
    box = choosing.explorer(users=8)
    grid, shown = box.children
    assert {c.description for c in grid.children} >= {"model", "device", "users at once", "perplexity lost", "prefer"}
    for control in grid.children:
        before, start = shown.value, control.value
        values = [value for _, value in control._options_full]
        control.value = values[(values.index(control.value) + 1) % len(values)]
        assert shown.value and "Traceback" not in shown.value
        if control.description in ("model", "device", "users at once", "context, tokens"):
            assert shown.value != before, control.description
        control.value = start
        assert shown.value == before


@pytest.mark.slow
@pytest.mark.parametrize("start", [
    {"users": 5}, {"max_loss": 0.007}, {"context": 3000}, {"device": "NVIDIA H200"}, {"tokens_per_s": 2000},
    {"device": hardware.Device("laptop", 8, 60), "model": "Llama-3-8B"},
])  # fmt: skip
def test_the_widget_starts_from_any_need(start):
    box = choosing.explorer(**start)
    assert box.children[1].value == choosing.table(decide(Need(**({"model": "Llama-2-70B"} | start)))).to_html()


@pytest.mark.parametrize("start", [{"device": "Abacus"}, {"model": "Nobody"}, {"users": 0}])
def test_a_widget_that_cannot_start_says_why(start):
    with pytest.raises(QtutorError):
        choosing.explorer(**start)
