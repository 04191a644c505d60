"""The kernel of bitsandbytes, where that is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from neoquant.grids import Codebook
from neoquant.kernels import Bitsandbytes, bnb, choose


def test_without_bitsandbytes_its_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("_lacking", "load_bitsandbytes"):  # which remember what earlier tests found
        monkeypatch.setattr(bnb, name, getattr(bnb, name).__wrapped__)
    for device in map(torch.device, ("cpu", "cuda")):
        assert Bitsandbytes().refuse(Codebook(), (8, 64), device) == "bitsandbytes is not installed"
        assert choose(Codebook(), (8, 64), device).name != "bitsandbytes"
