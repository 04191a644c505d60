"""What this machine has, and which kernels that lets neoquant use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from neoquant import __version__
from neoquant.sizes import plural

Fact = tuple[str, str]

LIBRARIES = (
    "torch",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "datasets",
    "transformers",
    "triton",
)

# What kernels for quantized weights look for, as Linux names it.
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16")

UNMEASURED = "written and tested on a simulated device, not yet on hardware"

_TYPICAL_SHAPE = (768, 768)


def facts() -> Iterator[Fact]:
    """(label, text) pairs, top to bottom."""
    import torch

    yield "neoquant", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    yield "libraries", ", ".join(f"{name} {installed(name)}" for name in LIBRARIES)
    model, features = _cpu()
    cores, running = plural(os.cpu_count() or 1, "core"), plural(torch.get_num_threads(), "thread")
    yield "cpu", f"{model}, {cores}, torch runs {running}"
    yield "features", f"{', '.join(features) or 'none known'}; torch uses {torch.backends.cpu.get_cpu_capability()}"
    if hasattr(os, "sysconf"):  # not on Windows
        yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{device.name}, {device.total_memory / 1e9:.1f} GB"
        yield "on GPUs", UNMEASURED
        yield "GPTQ on GPUs", _rounding()
    else:
        yield "cuda", "no device" if torch.version.cuda else "no device, and this torch is built without CUDA"
    yield "native", _native()
    yield from _kernels()


def installed(package: str) -> str:
    """Its version, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _native() -> str:
    """Which path of the native library is active, and why."""
    from neoquant import native

    active = native.active()
    chosen_by = f"{native.SWITCH} and {native.TEAM_SWITCH} choose"
    return f"{active.reason}; {chosen_by}" if active.library is not None else f"none: {active.reason}"


def _rounding() -> str:
    """What rounds the columns of a weight that lies on a GPU, and why."""
    from neoquant import native
    from neoquant.triton import gptq

    if (reason := gptq.refuse()) is None:
        return "a launch of Triton's a block of columns; on a trellis, the native library on the CPU"
    fallback = "torch" if native.active().library is None else "the native library on the CPU"
    return f"columns are rounded by {fallback} (not Triton: {reason})"


def _cpu() -> tuple[str, list[str]]:
    """The processor's name and those of `CPU_FEATURES` that it has; nothing known where there is no /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    known = {key.strip(): value.split() for key, value in fields.items()}
    flags = set(known.get("flags", known.get("Features", [])))
    name = " ".join(known.get("model name", [])) or platform.machine()
    return name, [feature for feature in CPU_FEATURES if feature in flags]


def _kernels() -> Iterator[Fact]:
    """For each device and grid, the kernel that runs and why the ones before it do not."""
    import torch

    from neoquant.grids import legal_pairs, make_grid
    from neoquant.kernels import KERNELS

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        for name, bits in {name: bits for bits, name in legal_pairs()}.items():
            reasons: list[str] = []
            for kernel in KERNELS.values():
                reason = kernel.refuse(make_grid(bits, name), _TYPICAL_SHAPE, device)
                if reason is None:
                    why = f" ({'; '.join(reasons)})" if reasons else ""
                    yield f"{name} on {device}", f"{kernel.name} kernel{why}"
                    break
                reasons.append(f"not {kernel.name}: {reason}")
