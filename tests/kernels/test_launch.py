"""What of launching needs no GPU: sources, what is missing and how to get it, memory that a kernel can read."""

import sys

import pytest
import torch

from qtool.errors import QtoolError
from qtool.kernels import launch
from qtool.kernels.launch import aligned, reason_not_to_run, source, sources_folder


def test_a_source_holds_each_of_its_headers_once() -> None:
    text = source("batch.cu")
    assert '#include "' not in text and "#pragma once" not in text
    headers = {path.name: path.read_text(encoding="utf-8").splitlines()[0] for path in sources_folder().glob("*.cuh")}
    assert {name: text.count(first) for name, first in headers.items()} == dict.fromkeys(headers, 1) and len(headers) == 3


def test_without_a_gpu_or_cupy_the_reason_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason_not_to_run() == "torch sees no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "pip install 'qtool[cuda]'" in str(reason_not_to_run())
    with pytest.raises(QtoolError, match="CUDA kernels need CuPy"):
        launch._function("decode_step.cu", "decode_step<>", 0, 0)


def test_an_old_gpu_is_told_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", torch)  # anything that imports
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5, not 8.0" in str(reason_not_to_run())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert reason_not_to_run() is None


def test_memory_that_a_kernel_cannot_read_at_once_is_copied() -> None:
    x = torch.arange(64.0).half()
    assert aligned(x).data_ptr() == x.data_ptr()
    for odd in (x[1:17], x.view(8, 8).T):
        copied = aligned(odd)
        assert torch.equal(copied, odd) and copied.is_contiguous() and copied.data_ptr() % 16 == 0
