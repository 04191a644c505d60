"""For pytest, `-p simulated_cuda.plugin`: the session has the simulated device, so that tests marked `gpu` run."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

_session = ExitStack()


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    from simulated_cuda.device import simulate
    from simulated_cuda.guard import NoCompilerError

    if torch.cuda.is_available():
        pytest.exit("this machine has a CUDA device: run make test-gpu instead", returncode=2)
    try:
        _session.enter_context(simulate())
    except NoCompilerError as reason:
        pytest.exit(f"NOT RUN: {reason}", returncode=0)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _session.close()
