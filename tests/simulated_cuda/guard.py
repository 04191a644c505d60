"""The device guard that torch's CPU builds lack, compiled when a test first needs it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


class NoCompilerError(Exception):
    """Why the guard cannot be had; the simulated device needs it."""


@cache
def load_guard() -> None:
    """Tell torch of CUDA device 0, for as long as this process lives. Raises NoCompilerError."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("the simulated device needs a C++ compiler (c++, g++, clang++ or CXX)")
    root = Path(torch.__file__).parent
    tag = hashlib.sha256(f"{torch.__version__} {root}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"neoquant-simulated-cuda-{os.getuid()}" / f"guard-{tag}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as made:
            command = [compiler, "-shared", "-fPIC", "-std=c++20", "-o", made.name, str(SOURCE)]
            command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            Path(made.name).unlink()
            raise NoCompilerError(f"{compiler} does not compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1]}")
        Path(made.name).replace(library)  # several processes may compile at once
    ctypes.CDLL(str(library))
