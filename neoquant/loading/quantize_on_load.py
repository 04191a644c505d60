"""Quantizing while loading: a plain checkpoint read as the quantized one that a plan would make of it.

Nothing is written, and no more of the plain model is in memory at once than while a folder is quantized; what comes
out is what `quantize`, then loading its folder would give, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from neoquant.calibration.dataset import LENGTH, ROWS, Calibration, draw, load_calibration
from neoquant.calibration.memory import estimate_memory
from neoquant.checkpoint import Checkpoint, TensorHeader, open_checkpoint
from neoquant.data.fingerprints import hash_texts
from neoquant.errors import RequestError, locate
from neoquant.formats import Format, detect
from neoquant.loading.contents import Readable
from neoquant.loading.device_map import DISK
from neoquant.loading.load import read_model
from neoquant.loading.quantization_config import BitsAndBytesConfig, GPTQConfig, describes, read_config
from neoquant.model.base import Network
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default, resolve_device
from neoquant.model.names import canonical_layer
from neoquant.progress import SILENT, Progress
from neoquant.quantization.plan import Plan, PlanRow, make_plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun
from neoquant.quantization.reverse import calibrating, look_at_unquantized, methods_of, needs_gradients
from neoquant.quantization.sequential import (
    QuantizedBlock,
    embed,
    needing_calibration,
    needs_calibration,
    quantize_blocks,
)
from neoquant.quantization.streaming import output_tensors
from neoquant.tensor import QuantizedTensor
from neoquant.tokenizer.tokenizer import Tokenizer

ModelT = TypeVar("ModelT", bound=Network)


@cpu_by_default()
def load_quantized(
    source: str | Path | None,
    cls: type[ModelT],
    quantization_config: Any,
    *,
    revision: str | None = None,
    mmap: bool = True,
    progress: Progress = SILENT,
    **options: Any,
) -> ModelT:
    """`loading.load_model`, quantized on the way; `options` are its.

    A checkpoint that is quantized already is loaded as it is, if it is what is asked for: only the type it computes
    in may be another.

    Raises RequestError for a request that cannot be carried out on this checkpoint, and what `load_model` raises.
    """
    with open_checkpoint(source, revision=revision, mmap=mmap, progress=progress) as checkpoint:
        found = detect(checkpoint.config, checkpoint.headers)
        if found is not None:
            compute_dtype = _stored_compute_dtype(checkpoint, quantization_config, found)
            return read_model(checkpoint, cls, compute_dtype=compute_dtype, progress=progress, **options)
        view, compute_dtype = quantized_view(checkpoint, quantization_config, progress, options.get("device"))
        return read_model(view, cls, compute_dtype=compute_dtype, progress=progress, **options)


def quantized_view(
    checkpoint: Checkpoint, quantization_config: Any, progress: Progress = SILENT, device: object = "cpu"
) -> tuple[Readable, torch.dtype | None]:
    """A plain checkpoint as the quantized one that is asked for, and the type its weights are to be multiplied in.

    Calibration is computed on the first GPU that `device` names, as `load_model` takes it, else on the CPU.

    Raises RequestError for a request that cannot be carried out on this checkpoint.
    """
    config = read_config(quantization_config)
    layers = [canonical_layer(name) for name in checkpoint.headers if name.endswith(".weight")]
    recipe = config if isinstance(config, Recipe) else config.recipe(layers)
    plan = make_plan(checkpoint, recipe)
    blocks: Iterator[QuantizedBlock] = iter(())
    if needs_calibration(plan):
        if not isinstance(config, GPTQConfig):
            needing = needing_calibration(plan)
            raise RequestError(f"{needing} needs calibration samples: pass a GPTQConfig with a dataset")
        samples = _calibration(checkpoint, config, progress)
        blocks = _blocks(checkpoint, plan, samples, _computing_device(device, plan), progress)
    compute_dtype = None if isinstance(config, Recipe) else config.compute_dtype
    return _QuantizedView(checkpoint, plan, blocks), compute_dtype


class _QuantizedView:
    """A plain checkpoint as the quantized one of a plan: weights are rounded when they are looked at.

    What is not quantized is what it was, in its own type.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, blocks: Iterator[QuantizedBlock]) -> None:
        self._checkpoint, self._plan, self._blocks = checkpoint, plan, blocks
        self.source, self.folder = checkpoint.source, checkpoint.folder
        self.dropped, self.notes = checkpoint.dropped, checkpoint.notes
        self.config = {key: value for key, value in plan.config.items() if key != "torch_dtype"}
        self.config["dtype"] = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))  # as it was
        self.headers: dict[str, TensorHeader] = {}
        self._rows: dict[str, PlanRow] = {}
        for row in plan.rows:
            for header in row.stored if row.grid is not None else [row.source] if row.action != "drop" else []:
                self.headers[header.name], self._rows[header.name] = header, row
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._calibrated_weights: dict[str, QuantizedTensor] = {}

    def view(self, name: str) -> torch.Tensor:
        row = self._rows[name]
        if row.grid is None:
            return self._checkpoint.view(row.name)
        if row.name not in self._tensors:
            with locate(row.name), torch.no_grad():
                weight, given = self._checkpoint.view(row.name), self._calibrated(row)
                self._tensors[row.name] = output_tensors(weight, row, self._plan.format, given)
        return self._tensors[row.name][name]

    def require_unchanged(self) -> None:
        self._checkpoint.require_unchanged()

    def forget(self, name: str) -> None:
        row = self._rows[name]
        self._tensors.pop(row.name, None)
        self._calibrated_weights.pop(row.name, None)
        self._checkpoint.forget(row.name)

    def _calibrated(self, row: PlanRow) -> QuantizedTensor | None:
        """The weight as a calibrated quantizer gives it, which takes all blocks before its own."""
        if row.quantizer is None or not row.quantizer.needs_calibration:
            return None
        while row.name not in self._calibrated_weights:
            self._calibrated_weights |= next(self._blocks).weights
        return self._calibrated_weights[row.name]


def _blocks(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration, device: torch.device, progress: Progress
) -> Iterator[QuantizedBlock]:
    config = GPTNeoConfig.from_dict(checkpoint.config)
    rows, length = calibration.ids.shape
    memory = estimate_memory(config, rows, length, methods=methods_of(plan), device=device)
    with tempfile.TemporaryDirectory(prefix="neoquant-") as folder, ResumableRun(Path(folder) / "model") as run:
        run.begin({}, config.num_layers)
        look_at_unquantized(checkpoint, plan, calibration, memory, run, progress)
        with torch.no_grad():
            hidden = run.new_hidden_states((rows, length, config.hidden_size), memory.spilled, device)
            embed(checkpoint, calibration.ids, hidden)
        samples = calibrating(hidden, calibration, memory, run)
        blocks = quantize_blocks(checkpoint, plan, samples, 0, progress)
        while True:
            with torch.no_grad():  # not across a yield, which would leave it on for whoever asks
                block = next(blocks, None)
            if block is None:
                return
            yield block


def _computing_device(device: object, plan: Plan) -> torch.device:
    """The first GPU that a model will lie on; the CPU where there is none, or the loss's gradients are needed."""
    named = list(device.values()) if isinstance(device, Mapping) else [device]
    places = [resolve_device("auto" if place in ("auto", "sequential") else place) for place in named if place != DISK]
    gpus = [] if needs_gradients(plan) else [place for place in places if place.type == "cuda"]
    return gpus[0] if gpus else torch.device("cpu")


def _calibration(checkpoint: Checkpoint, config: GPTQConfig, progress: Progress) -> Calibration:
    """The rows that the configuration's dataset gives."""
    tokenizer = config.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        if not isinstance(tokenizer, str | Path | None):
            raise RequestError(
                f"tokenizer is of type {type(tokenizer).__name__}; legal is neoquant's, or a folder or hub id"
            )
        tokenizer = Tokenizer.from_pretrained(checkpoint.source if tokenizer is None else tokenizer)
    context = GPTNeoConfig.from_dict(checkpoint.config).max_position_embeddings
    length = min(LENGTH, context) if config.model_seqlen is None else config.model_seqlen
    if isinstance(config.dataset, str):
        return load_calibration(config.dataset, tokenizer, length=length, progress=progress)
    texts = config.dataset or []
    if tokenizer.eos_token_id is None:
        raise RequestError("the tokenizer names no end of text, which stands between the texts of the dataset")
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    total = sum(len(ids) + 1 for ids in encoded)
    length = max(1, min(length, total))
    ids = draw(encoded, tokenizer.eos_token_id, min(ROWS, max(1, total // length)), length, seed=0)
    return Calibration(ids, "texts", hash_texts(texts), 0)


def _stored_compute_dtype(checkpoint: Checkpoint, quantization_config: Any, found: Format) -> torch.dtype | None:
    """The type to multiply in that is asked for of a checkpoint which is quantized already; None leaves it as stored.

    Raises RequestError unless it is quantized just as `quantization_config` says.
    """
    stored = checkpoint.config.get("quantization_config") or {}
    if not describes(quantization_config, stored):
        read_config(quantization_config)
        raise RequestError(
            f"{checkpoint.source} is already quantized (format {found.name}), and not as quantization_config asks: "
            "quantizing twice loses twice, so leave quantization_config out, or name the model it was made from"
        )
    config = read_config(quantization_config) if found.family == "bitsandbytes" else None
    return config.compute_dtype if isinstance(config, BitsAndBytesConfig) else None
