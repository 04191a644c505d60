"""What is compared: each tool's way to one grid, made into a checkpoint folder and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import neoquant
from neoquant.calibration.dataset import Calibration
from neoquant.grids import Affine, Grid, make_grid
from neoquant.loading.load import load_model
from neoquant.nn.linear import QuantLinear

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, versions_in

DRIVERS = ROOT / "eval" / "peers"
AFFINE = [
    Affine(4, 64, False),
    Affine(4, 64, True),
    Affine(4, 128, False),
    Affine(4, 128, True),
    Affine(3, 64, False),
    Affine(3, 64, True),
    Affine(2, 32, False),
]
NF4 = make_grid(4, "nf4", block_size=64, double_quant=True)

NEAREST, FEEDBACK = "nearest", "neoquant"  # both ours: without and with calibration
OBJECTIVES: dict[str, dict[str, Any]] = {  # ours as well: GPTQ by other objectives than its default
    "neoquant, model": {"objective": "model", "correction": 0.0},
    "neoquant, attention": {"objective": "attention", "correction": 0.0},
    "neoquant, layer": {"objective": "layer", "correction": 0.0},
}
SHORT = {  # the grids by what a command line calls them
    **{f"affine{g.bits}-g{g.group_size}{'-sym' * g.symmetric}": g for g in AFFINE},
    "nf4": NF4,
}


@dataclass(frozen=True)
class Peer:
    """Another tool's way: a driver in eval/peers, run by an interpreter that has the tool."""

    name: str
    driver: str
    package: str
    options: tuple[str, ...] = ()
    calibrated: bool = True


PEERS = (  # each with its own defaults
    Peer("llm-compressor", "llmcompressor_gptq.py", "llmcompressor", ("--actorder", "static")),
    Peer("GPTQModel", "gptqmodel_gptq.py", "gptqmodel", ("--order", "group-aware")),
)
DESC_ACT = Peer("GPTQModel desc_act", "gptqmodel_gptq.py", "gptqmodel", ("--order", "desc-act"))
GPTAQ = Peer("GPTQModel GPTAQ", "gptqmodel_gptq.py", "gptqmodel", ("--order", "group-aware", "--gptaq"))
HQQ = Peer("HQQ", "hqq_library.py", "hqq", calibrated=False)


def autoround(steps: int) -> Peer:
    """AutoRound, which learns rounding in so many steps for each block."""
    return Peer(f"AutoRound, {steps:,} steps", "autoround.py", "auto-round", ("--iterations", str(steps)))


@dataclass(frozen=True)
class Candidate:
    """One tool's way to one grid."""

    tool: str
    grid: Grid

    @property
    def label(self) -> str:
        """The grid in a few words, for tables."""
        if not isinstance(self.grid, Affine):
            return "NF4, double quantization"
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return f"{self.grid.bits} bits, groups of {self.grid.group_size}, {kind}"


class Maker:
    """Makes candidates' folders under `work`; what is there already is not made again.

    A folder's name holds a hash of everything that it depends on: the model's weights, the calibration rows, the grid,
    and of a peer its version and options, of neoquant all its source files.
    """

    def __init__(
        self,
        model: Path,
        work: Path,
        pythons: dict[str, Path],
        peers: tuple[Peer, ...] = PEERS,
        own: tuple[str, ...] = (),
        grids: tuple[Grid, ...] = (*AFFINE, NF4),
        options: dict[str, Any] | None = None,
    ) -> None:
        """`pythons`: package of a peer -> an interpreter that has it; peers without one are left out. `own`: which of
        `OBJECTIVES` take part. `options`: those of GPTQ that ours is made with, beside its defaults."""
        self.own, self.grids, self.options = own, grids, options or {}
        self.model, self.work = model.resolve(), work.resolve()
        self.pythons = {package: python.absolute() for package, python in pythons.items()}
        self.model_sha256 = file_sha256(model / "model.safetensors")
        self.source_sha256 = source_sha256()
        self.versions = {
            package: versions_in(python, (package, "torch", "transformers")) for package, python in self.pythons.items()
        }
        self.peers = {peer.name: peer for peer in peers if peer.package in pythons}

    def candidates(self) -> list[Candidate]:
        """Everything that can be made with the interpreters at hand, in the order of the tables."""
        ours = [NEAREST, FEEDBACK, *self.own]
        return [
            Candidate(tool, grid) for grid in self.grids for tool in (ours if grid == NF4 else [*ours, *self.peers])
        ]

    def key(self, candidate: Candidate, calibration: Calibration) -> str:
        """Names a candidate's folder."""
        depends: dict[str, Any] = {
            "model": self.model_sha256,
            "grid": candidate.grid.describe(),
            "tool": candidate.tool,
        }
        peer = self.peers.get(candidate.tool)
        if peer.calibrated if peer else candidate.tool != NEAREST:
            depends["rows"] = rows_sha256(calibration)
        depends |= {"versions": self.versions[peer.package], "options": peer.options} if peer else {}
        depends |= {} if peer else {"source": self.source_sha256}
        depends |= {"asked": self.options} if candidate.tool == FEEDBACK and self.options else {}
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        grid = "-".join(str(value) for value in candidate.grid.describe().values())
        return f"{candidate.tool}-{grid}-{digest[:16]}".replace(" ", "-").lower()

    def make(self, candidate: Candidate, calibration: Calibration) -> tuple[Path, dict[str, Any]]:
        """The candidate's folder, and what is known of its making."""
        folder = self.work / "models" / self.key(candidate, calibration)
        record = folder.with_suffix(".json")
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            peer = self.peers.get(candidate.tool)
            made = (
                self._run(peer, candidate, calibration, folder) if peer else self._own(candidate, calibration, folder)
            )
            record.write_text(json.dumps({**made, "sha256": file_sha256(folder / "model.safetensors")}), "utf-8")
        return folder, json.loads(record.read_text("utf-8"))

    def _own(self, candidate: Candidate, calibration: Calibration, folder: Path) -> dict[str, Any]:
        feedback = candidate.tool != NEAREST
        options = self.options if candidate.tool == FEEDBACK else OBJECTIVES.get(candidate.tool, {})
        asked = {key: value for key, value in candidate.grid.describe().items() if key not in ("name", "bits")}
        recipe = neoquant.Recipe.simple(
            candidate.grid.bits, candidate.grid.name, quantizer="gptq" if feedback else "nearest", **asked, **options
        )
        started = time.perf_counter()
        neoquant.quantize(self.model, folder, recipe, calibration=calibration if feedback else None)
        return {
            "work_s": round(time.perf_counter() - started, 2),
            "versions": {"neoquant": neoquant.__version__, "source_sha256": self.source_sha256},
        }

    def _run(self, peer: Peer, candidate: Candidate, calibration: Calibration, folder: Path) -> dict[str, Any]:
        grid = candidate.grid
        assert isinstance(grid, Affine)
        command = [self.pythons[peer.package], DRIVERS / peer.driver, self.model]
        if peer.calibrated:
            rows = self.work / f"rows-{rows_sha256(calibration)[:16]}.pt"
            torch.save(calibration.ids, rows)
            command.append(rows)
        command += [folder, "--bits", grid.bits, "--group-size", grid.group_size, *peer.options]
        command += ["--symmetric"] if grid.symmetric else []
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(  # in `work`, for the logs that a tool leaves
            [str(part) for part in command], env=environment, cwd=self.work, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        record: dict[str, Any] = json.loads((folder / "peer.json").read_text("utf-8"))
        return record


def load_dense(folder: Path) -> neoquant.GPTNeoForCausalLM:
    """A checkpoint with every quantized weight multiplied out in float32: no kernel's rounding in the figures."""
    model = load_model(folder, neoquant.GPTNeoForCausalLM, dtype=torch.float32, device="cpu")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            weight = layer.quantized.dequantize(torch.float32)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = layer.bias
            model.set_submodule(name, linear)
    return model


def rows_sha256(calibration: Calibration) -> str:
    return hashlib.sha256(calibration.ids.numpy().tobytes()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def source_sha256() -> str:
    """Of all source files of the package that computes here, names included."""
    package = Path(neoquant.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
