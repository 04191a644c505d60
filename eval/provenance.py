"""When, with what and on what a figure was measured: for the results of the scripts below this folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance(packages: tuple[str, ...]) -> dict[str, Any]:
    """Date, commit, machine, and versions of `packages`."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "neoquant")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source checkout" if package == "neoquant" else "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed else ""),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
    }


def _processor() -> str:
    """Its name, and the family and model that say which generation it is: names alone do not."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.processor())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def _git(*words: str) -> str:
    """What git says of this project; nothing where there is no git."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def versions_in(python: Path | str, packages: tuple[str, ...]) -> dict[str, str]:
    """Of `packages`, in the environment of another interpreter. Exits if it lacks one."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {packages!r}}}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found
