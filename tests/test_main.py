"""python -m fused_l2: what a bug report needs."""

from __future__ import annotations

import subprocess
import sys

import torch

import fused_l2


def test_it_prints_versions_and_engines():
    printed = subprocess.run([sys.executable, "-m", "fused_l2"], capture_output=True, text=True, check=True).stdout
    for expected in (fused_l2.__version__, torch.__version__, "Python", "library", str(fused_l2.capabilities())):
        assert expected in printed
