"""From one format to another, without rounding: the same codes and parameters in other tensors, or plain weights.

Works through a checkpoint layer by layer and appears whole or not at all, as quantizing does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neoquant.checkpoint import SHARD_SIZE, Checkpoint, CheckpointWriter, TensorHeader, open_checkpoint
from neoquant.checkpoint.headers import float_type
from neoquant.errors import RequestError, locate
from neoquant.files.names import output_folder
from neoquant.files.reading import read_text
from neoquant.formats import FORMATS, Format, detect_checked
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default
from neoquant.model.dtypes import resolve_dtype
from neoquant.model.names import TIED_HEAD, canonical_layer, left_out
from neoquant.progress import SILENT, Progress
from neoquant.quantization.conversion_targets import (
    PLAIN,
    TARGETS,
    refuse_layer,
    require_sense,
    target_name,
)
from neoquant.quantization.model_card import measured_in, render_conversion_card
from neoquant.quantization.plan_checks import require_tensors
from neoquant.quantization.plan_notes import dropped_notes
from neoquant.quantization.plan_rows import is_linear_weight
from neoquant.quantization.quantize import CALIBRATION, CARD, RECORD, read_record, record_json, require_another_folder
from neoquant.quantization.streaming import converted
from neoquant.sizes import peak_rss_bytes
from neoquant.tensor import QuantizedTensor

__all__ = ["PLAIN", "TARGETS", "ConvertResult", "convert"]


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` made. `before` and `after` are names of formats, or "safetensors" for plain weights."""

    folder: Path
    source: str
    revision: str | None
    before: str
    after: str
    layers: Mapping[str, Grid]
    """Quantized layers that were converted, by their names in a causal language model."""
    source_bytes: int
    weights_bytes: int
    """Of all tensors, without the files' headers."""
    notes: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    tensors: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Of each layer or plain tensor of the source: name, shape, what was done, and bytes."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {
            "folder": str(self.folder),
            "source": self.source,
            "revision": self.revision,
            "before": self.before,
            "after": self.after,
            "source_bytes": self.source_bytes,
            "weights_bytes": self.weights_bytes,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "tensors": list(self.tensors),
        }


@cpu_by_default()
def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    dequantize: bool = False,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Convert a checkpoint into the folder `out`, one layer in memory at a time; nothing is rounded again.

    Args:
        source: a folder, or an id on the hub at `revision`.
        out: the folder to make; it must not exist, unless `force` may replace a model.
        to: a key of `TARGETS`: a format, a family of formats, gptq-v1 or gptq-v2, or "safetensors" for a checkpoint
            that is not quantized, which is written anew (from `pytorch_model.bin`, say).
        dequantize: give plain weights, which every program reads, instead of quantized ones.
        dtype: of plain weights: a torch type, its name, or None for the checkpoint's own.
        shard_size: bytes of tensors in one output file.
        progress: told of every tensor.

    Raises:
        RequestError: there is no such format, it cannot hold a layer exactly, or there is nothing to convert.
        CheckpointError, FormatError, HubError: the source cannot be read.
        OutputError: `out` cannot be written.
    """
    started = time.perf_counter()
    folder = output_folder(out)
    if to is not None and to not in TARGETS:
        raise RequestError(f"no format is called {to!r}; there are {', '.join(TARGETS)}")
    require_another_folder(source, folder)
    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        with locate(f"{checkpoint.source}/config.json"):
            config = GPTNeoConfig.from_dict(checkpoint.config)
        with locate(checkpoint.source):
            found, notes = detect_checked(checkpoint.config, checkpoint.headers, checkpoint.view)
        require_sense(checkpoint, found, to, dequantize, dtype)
        with locate(checkpoint.source):
            layers = found.quantized(checkpoint.headers) if found else {}
            require_tensors([*checkpoint.headers, *(f"{layer}.weight" for layer in layers)], config)
        packed = {layer + suffix for layer, suffixes in layers.items() for suffix in suffixes}
        stored = float_type(header for name, header in checkpoint.headers.items() if name not in packed)
        plain = None
        if dtype is not None or dequantize:
            plain = resolve_dtype(dtype or "auto", config, torch.device("cpu"), stored)
        own = plain or resolve_dtype("auto", config, torch.device("cpu"), stored)
        with CheckpointWriter(folder, tensors=2 * len(checkpoint.headers), force=force, shard_size=shard_size) as sink:
            targets = None if dequantize or to == PLAIN else TARGETS[to or ""]
            job = _Conversion(checkpoint, found, layers, targets, own, plain)
            job.notes |= dict.fromkeys(notes)
            with torch.inference_mode(), progress.task("converting", total=checkpoint.nbytes) as advance:
                for name, tensor, read in job.tensors():
                    if tensor is not None:
                        sink.put(name, tensor)
                    advance(read)
            checkpoint.require_unchanged()
            result = job.result(folder, started)
            sink.finish(job.config(), files=_files(checkpoint, job, result))
    return result


class _Conversion:
    """The work on one checkpoint, and what is known of it when it is done."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        found: Format | None,
        layers: Mapping[str, list[str]],
        targets: tuple[Format, ...] | None,
        own: torch.dtype,
        plain: torch.dtype | None,
    ) -> None:
        """`layers` are those that are quantized, with their tensors' suffixes; `targets` None gives plain weights;
        `own` is the checkpoint's type, `plain` that of plain weights, if it is to change."""
        self.checkpoint, self.found, self.layers, self.targets = checkpoint, found, layers, targets
        self.own, self.plain = own, plain
        self.target: Format | None = None
        self.grids: dict[str, Grid] = {}
        self.ordered = self.drops = False
        self.kept: list[str] = []
        self.notes: dict[str, None] = {}
        self.rows: list[dict[str, Any]] = []
        self.weights_bytes = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | None, int]]:
        """Tensors of the output, by name, and bytes of the source that were dealt with; some give no tensor."""
        headers, layers = self.checkpoint.headers, dict(self.layers)
        layer_of = {layer + suffix: layer for layer, suffixes in layers.items() for suffix in suffixes}
        for name, header in headers.items():
            layer = layer_of.get(name)
            used = [name] if layer is None else [layer + suffix for suffix in layers.pop(layer, [])]
            if not used:
                continue  # the layer's tensors were dealt with together
            with locate(self.checkpoint.source), locate(layer or name):
                made = self._plain(header) if layer is None else self._layer(layer, used)
            self.rows[-1]["bytes"] = sum(tensor.nbytes for tensor in made.values())
            self.weights_bytes += self.rows[-1]["bytes"]
            yield from ((stored, tensor, 0) for stored, tensor in made.items())
            yield name, None, sum(headers[each].nbytes for each in used)
            for each in used:
                self.checkpoint.forget(each)

    def config(self) -> dict[str, Any]:
        """`config.json` of the output."""
        config = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        if self.target is not None:
            config["quantization_config"] = self.target.config(self.grids, left_out(self.kept), self.ordered)
        elif self.plain is not None:
            for key in ("dtype", *(["torch_dtype"] if "torch_dtype" in config else [])):
                config[key] = dtype_name(self.plain)
        return config

    def result(self, folder: Path, started: float) -> ConvertResult:
        self.notes |= dict.fromkeys((*self.checkpoint.notes, *dropped_notes(self.drops, self.checkpoint.dropped)))
        return ConvertResult(
            folder=folder,
            source=self.checkpoint.source_name,
            revision=self.checkpoint.revision,
            before=self.found.name if self.found else PLAIN,
            after=target_name(self.target),
            layers=self.grids,
            source_bytes=self.checkpoint.nbytes,
            weights_bytes=self.weights_bytes,
            notes=tuple(self.notes),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
            tensors=tuple(self.rows),
        )

    def _layer(self, layer: str, used: Iterable[str]) -> dict[str, torch.Tensor]:
        assert self.found is not None
        stored = {name.removeprefix(layer): self.checkpoint.view(name) for name in used}
        q = self.found.decode(stored, None, self.own)
        name = canonical_layer(f"{layer}.weight")
        row = {"name": f"{layer}.weight", "shape": list(q.shape)}
        if self.targets is None:
            self.rows.append(row | {"action": "dequantize", "before": q.grid.describe()})
            return {f"{layer}.weight": converted(q.dequantize(torch.float32), self.plain or self.own)}
        self.target = self.target or self._choose(name, q)
        self.grids[name] = q.grid
        self.ordered |= q.order is not None
        self._require_exact(self.target, name, q)
        self.rows.append(row | {"action": "convert", "grid": q.grid.describe()})
        return {layer + suffix: tensor for suffix, tensor in self.target.encode(q).items()}

    def _plain(self, header: TensorHeader) -> dict[str, torch.Tensor]:
        name, weight = header.name, self.checkpoint.view(header.name)
        row = {"name": name, "shape": list(header.shape)}
        if is_linear_weight(header):
            self.kept.append(canonical_layer(name))
        if name == TIED_HEAD and GPTNeoConfig.from_dict(self.checkpoint.config).tie_word_embeddings:
            self.rows.append(row | {"action": "drop"})
            self.drops = True
            return {}
        self.rows.append(row | {"action": "copy"})
        if self.plain is not None and weight.is_floating_point():
            weight = converted(weight, self.plain)
        return {name: weight}

    def _choose(self, name: str, q: QuantizedTensor) -> Format:
        """The first target that holds this layer; if none does, the first, which is then refused with its reason."""
        assert self.targets
        return next((format for format in self.targets if refuse_layer(format, name, q) is None), self.targets[0])

    def _require_exact(self, target: Format, name: str, q: QuantizedTensor) -> None:
        """Refuse a layer that the target cannot hold as it is; note what it does not say."""
        reason = refuse_layer(target, name, q) or target.refuse_all(self.grids)
        if reason is None:
            if caution := target.caution(q.grid, q.shape):
                self.notes[caution] = None
            if not target.holds_dtype and q.dtype != self.own:
                before, now = dtype_name(q.dtype), dtype_name(self.own)
                self.notes[
                    f"{target_name(target)} does not say what type weights had before: {before} is now {now}"
                ] = None
            return
        others = [format.family for format in FORMATS.values() if format.family != target.family]
        if target.name == "gptq" and target_name(target) != "gptq-v2":  # the version may be all that is wrong
            others.insert(0, "gptq-v2")
        legal = [
            key for key in dict.fromkeys(others) if any(refuse_layer(each, name, q) is None for each in TARGETS[key])
        ]
        exact = f"--to {' or '.join(legal)} can, and " if legal else ""
        raise RequestError(f"{reason}: {exact}--dequantize gives plain weights")


def _files(checkpoint: Checkpoint, job: _Conversion, result: ConvertResult) -> dict[str, str | Path]:
    """What stands beside the weights: tokenizer and licence, the card, the record, and what calibration saw."""
    from neoquant import __version__

    assert checkpoint.folder is not None  # opened with its files
    files: dict[str, str | Path] = {path.name: path for path in checkpoint.companions()}
    calibration, card = checkpoint.folder / CALIBRATION, checkpoint.folder / CARD
    if job.target is not None and calibration.is_file():
        files[CALIBRATION] = calibration
    before = read_record(checkpoint.folder)
    measured = measured_in(read_text(card)) if job.target is not None and card.is_file() else None
    made_by = {key: before[key] for key in ("neoquant", "source") if key in before}
    record: dict[str, Any] = {
        "neoquant": __version__,
        "source": result.source,
        "revision": result.revision,
        "converted_from": {"format": result.before, **made_by},
        "format": result.after,
        "notes": list(result.notes),
        "tensors": list(result.tensors),
    }
    if job.target is not None:
        record |= {key: before[key] for key in ("recipe", "tuned") if key in before}
    files[RECORD] = record_json(record)
    files[CARD] = render_conversion_card(
        result.folder.name,
        result.source,
        result.revision,
        job.config(),
        set(job.grids.values()),
        (result.before, result.after),
        job.target.family if job.target else None,
        measured,
    )
    return files
