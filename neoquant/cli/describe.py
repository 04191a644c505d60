"""What a checkpoint is, from its headers and the record that neoquant leaves in the folders it makes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.errors import CheckpointError, NeoquantError
from neoquant.files.reading import MAX_LARGE_BYTES, read_json
from neoquant.progress import Progress

if TYPE_CHECKING:
    from neoquant.checkpoint import Checkpoint
    from neoquant.evaluation import ModelInfo
    from neoquant.formats import Format
    from neoquant.model.config import GPTNeoConfig


@dataclass(frozen=True)
class Description:
    """Sizes in bytes; `quantization` is config.json's, `record` neoquant's own: both may be empty."""

    config: GPTNeoConfig
    format: Format | None
    parameters: int
    bytes: int
    bits_per_weight_linears: float
    bits_per_weight_model: float
    quantization: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def grids(self) -> str:
        """The grids and their options: counted where neoquant's record lists them, else what config.json says."""
        from neoquant.grids import grid_from_dict
        from neoquant.report.formatting import grid_label
        from neoquant.sizes import plural

        rows = [row["grid"] for row in self.record.get("tensors", []) if "grid" in row]
        try:
            counted = Counter(grid_label(grid_from_dict(row)) for row in rows)
        except NeoquantError:
            return "not stated: the record is damaged"
        if counted:
            return "; ".join(f"{plural(count, 'weight')} {grid}" for grid, count in counted.items())
        stated = self.quantization
        if stated.get("load_in_4bit"):
            nested = "double quant" if stated.get("bnb_4bit_use_double_quant") else "no double quant"
            return f"{stated.get('bnb_4bit_quant_type')}, {nested} (as config.json says)"
        return "int8" if stated.get("load_in_8bit") else "not stated"


def _is_of_linear(name: str) -> bool:
    """Whether a tensor holds part of a block linear's weight, however it is packed: all under its name but the bias."""
    from neoquant.model.names import BLOCK_LINEARS, in_block

    place = in_block(name)
    if place is None or place[1].endswith(".bias"):
        return False
    return place[1].startswith(tuple(f"{linear}." for linear in BLOCK_LINEARS))


def describe(checkpoint: Checkpoint) -> Description:
    """Read what the headers say.

    Raises:
        ConfigError: config.json is not a legal GPT-Neo's.
    """
    from neoquant.formats import detect
    from neoquant.model.config import GPTNeoConfig
    from neoquant.model.names import TABLES, canonical_layer
    from neoquant.quantization.quantize import RECORD

    config = GPTNeoConfig.from_dict(checkpoint.config)
    linears = [header for name, header in checkpoint.headers.items() if _is_of_linear(name)]
    linear_bytes = sum(header.nbytes for header in linears)
    weights = config.num_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.inner_size)
    format = detect(checkpoint.config, checkpoint.headers)
    tables = [
        layer
        for layer in (format.quantized(checkpoint.headers) if format else ())
        if canonical_layer(f"{layer}.weight") in TABLES
    ]
    inside = {header.name for header in linears}
    inside |= {name for name in checkpoint.headers if name.startswith(tuple(f"{table}.weight" for table in tables))}
    others = sum(header.numel for name, header in checkpoint.headers.items() if name not in inside)
    others += len(tables) * config.vocab_size * config.hidden_size
    return Description(
        config=config,
        format=format,
        parameters=weights + others,
        bytes=checkpoint.nbytes,
        bits_per_weight_linears=8 * linear_bytes / max(1, weights),
        bits_per_weight_model=8 * checkpoint.nbytes / max(1, weights + others),
        quantization=checkpoint.config.get("quantization_config") or {},
        record=_read_record(checkpoint.folder, RECORD),
    )


def model_info(source: str | Path, revision: str | None, name: str, progress: Progress) -> ModelInfo:
    """What a result says of the model it was measured on."""
    from neoquant.checkpoint import open_checkpoint
    from neoquant.evaluation import ModelInfo

    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        found = describe(checkpoint)
        return ModelInfo(
            name=name,
            source=checkpoint.source_name,
            revision=checkpoint.revision,
            bytes_on_disk=found.bytes,
            bits_per_weight_linears=found.bits_per_weight_linears,
            bits_per_weight_model=found.bits_per_weight_model,
            parameters=found.parameters,
            format=found.format.name if found.format else None,
            recipe=found.record.get("recipe"),
            calibration=_seen(calibration_record(checkpoint)),
            sha256=hash_weights(checkpoint, progress),
        )


def _seen(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The samples of calibration and what tuning did, by `calibration.json`; None where there were none."""
    samples, tuned = record.get("calibration"), record.get("tuned")
    if samples is None or tuned is None:
        return samples
    kept = ("base", "base_revision", "calibration", "steps", "learning_rate", "loss", "changed")
    return {**samples, "tuned": {key: tuned[key] for key in kept if key in tuned}}


def calibrated_on(source: str | Path, revision: str | None, progress: Progress) -> frozenset[str]:
    """The fingerprints of the documents that a checkpoint was calibrated on; none where it does not say."""
    from neoquant.checkpoint import open_checkpoint

    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        documents = calibration_record(checkpoint).get("documents", [])
    return frozenset(map(str, documents)) if isinstance(documents, list) else frozenset()


def calibration_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What calibration saw and how layers came out, as `calibration.json` says; empty where there is none."""
    from neoquant.quantization.quantize import CALIBRATION

    return _read_record(checkpoint.folder, CALIBRATION)


def _read_record(folder: Path | None, name: str) -> dict[str, Any]:
    """A record that neoquant left in a folder; empty where there is none that can be read: it is not needed to run."""
    try:
        record = read_json(folder / name, limit=MAX_LARGE_BYTES) if folder is not None else {}
    except CheckpointError:
        return {}
    return record if isinstance(record, dict) and all(map(_is_part_of_record, record, record.values())) else {}


def _is_part_of_record(key: str, value: Any) -> bool:
    """Whether a value has the type that it has in a record of neoquant."""
    if key == "tensors":
        return isinstance(value, list) and all(
            isinstance(row, dict) and isinstance(row.get("grid", {}), dict) for row in value
        )
    return isinstance(value, dict) or key not in ("recipe", "converted_from", "layers", "calibration", "tuned")


def hash_weights(checkpoint: Checkpoint, progress: Progress) -> str:
    """SHA-256 over the weight files, in the order of their names."""
    digest = hashlib.sha256()
    files = checkpoint.weight_files()
    with progress.task("hashing", total=sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
                    advance(len(piece))
    return digest.hexdigest()
