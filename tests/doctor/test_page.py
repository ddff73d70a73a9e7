"""docs/doctor.md shows what the doctor prints, and has every code."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

PAGE = (ROOT / "docs" / "doctor.md").read_text()


def test_the_report_is_the_scripts():
    script = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    place: dict = {}
    exec(script[1], place)
    # Digits of norms depend on how a machine makes random numbers: the table's are not compared.
    printed = str(place["report"]).split("\n\n")
    assert shown[1].split("\n\n")[0].strip() == printed[0].strip()
    assert shown[1].split("\n\n")[1].splitlines()[0].split() == printed[1].splitlines()[0].split()
    assert torch.is_grad_enabled()


def test_every_code_is_explained():
    source = "".join(f.read_text() for f in (ROOT / "fused_l2" / "doctor" / "codes").glob("*.py"))
    codes = set(re.findall(r'^\s+f?"([a-z]+(?:-[a-z]+)+)", ', source, re.MULTILINE)) | {"decayed-bias", "decayed-norm"}
    assert len(codes) >= 21
    for code in codes:
        assert f"`{code}`" in PAGE, code
