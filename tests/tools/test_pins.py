"""Pins: a proposal changes what pip found, keeps the rest and its order."""

from __future__ import annotations

import json
import subprocess

import pytest

from qtutor import QtutorError
from tools import pins

TEXT = "# tested\naccelerate==1.0\nJinja2==3.1\nnumpy==2.4.6\ntorch==2.13.0\n"


def test_proposed_versions_replace_the_old_ones():
    text, changed = pins.proposed(TEXT, {"jinja2": "3.2", "torch": "2.13.1+cpu", "New_One": "0.1", "numpy": "2.4.6"})
    assert text == "# tested\naccelerate==1.0\nJinja2==3.2\nNew_One==0.1\nnumpy==2.4.6\ntorch==2.13.1\n"
    assert changed == ["Jinja2 3.1 -> 3.2", "New_One new -> 0.1", "torch 2.13.0 -> 2.13.1"]


def test_the_pins_are_in_their_order_already():
    text = pins.CONSTRAINTS.read_text("utf-8")
    assert pins.proposed(text, {}) == (text, [])


def test_pips_report_is_read_and_its_failure_is_one_line(tmp_path, monkeypatch, capsys):
    said = {"install": [{"metadata": {"name": name, "version": "9"}} for name in ("qtutor", "numpy")]}
    monkeypatch.setattr(pins, "CONSTRAINTS", tmp_path / "constraints.txt")
    pins.CONSTRAINTS.write_text(TEXT, "utf-8")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, json.dumps(said), ""))
    assert pins.main([]) == 0 and "numpy 2.4.6 -> 9" in capsys.readouterr().out
    assert "numpy==9\n" in pins.CONSTRAINTS.read_text("utf-8")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "x\nERROR: no way"))
    with pytest.raises(QtutorError, match="ERROR: no way"):
        pins.main([])
