"""`neoquant tune`: a quantized model whose scales, biases and norms are trained, in the format that it has.

The loss is the KL divergence of its predictions from those of the model that it was made from, on calibration samples:
distillation (Hinton et al., arXiv:1503.02531) at a temperature of 1. Codes stay, as in the second phase of EfficientQAT
(Chen et al., arXiv:2407.11062).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neoquant.calibration.dataset import Calibration
from neoquant.checkpoint import SHARD_SIZE, Checkpoint, CheckpointWriter, check_output, open_checkpoint
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.files.names import output_folder
from neoquant.formats import Format, detect
from neoquant.loading.contents import Contents
from neoquant.loading.load import read_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default
from neoquant.progress import SILENT, Progress
from neoquant.quantization.quantize import read_record, require_another_folder
from neoquant.quantization.sequential import require_samples_fit
from neoquant.quantization.source_hash import hash_tensor, join_hashes
from neoquant.sizes import peak_rss_bytes
from neoquant.tensor import QuantizedTensor
from neoquant.tuning.layers import Tunable
from neoquant.tuning.records import tuned_files
from neoquant.tuning.training import Predictor, Samples, Schedule, train

PASSES, LEARNING_RATE = 2, 1e-3
"""Where nothing else is asked for; passes of steps over the samples."""

_PARTS = 32  # of a run, whose mean losses are recorded
_COMPARED = (  # what of config.json must be the same in both models
    *("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads", "inner_size"),
    *("attention_layers", "window_size", "activation_function", "layer_norm_epsilon"),
)


@dataclass(frozen=True)
class TuneResult:
    """What `tune` made. Losses are mean KL divergences from `base`'s predictions, in nats a token."""

    folder: Path
    source: str
    base: str
    base_revision: str | None
    """On the hub; None for a folder."""
    format: str
    calibration: Mapping[str, Any]
    """The samples, as `Calibration.describe` has them."""
    schedule: Schedule
    trained: Mapping[str, int]
    """How many scales, biases and numbers in norms could change."""
    held: int
    """Samples of these, the last ones, that no step saw."""
    before: float
    after: float
    """On the samples that were held out, by what was stored before, and by what would be stored now."""
    curve: tuple[tuple[int, float], ...] = field(repr=False)
    """Steps done, and the mean loss of those since the last entry, each on its own samples."""
    notes: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int

    @property
    def changed(self) -> bool:
        """Whether the loss fell: else everything was written as it came."""
        return self.after < self.before

    def record(self) -> dict[str, Any]:
        """For the folder's own record: nothing that two runs of one request would differ in."""
        return {
            "base": self.base,
            "base_revision": self.base_revision,
            "calibration": dict(self.calibration),
            "steps": self.schedule.steps,
            "learning_rate": self.schedule.learning_rate,
            "trained": dict(self.trained),
            "loss": {"samples": self.held, "before": self.before, "after": self.after},
            "changed": self.changed,
            "curve": [list(point) for point in self.curve],
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {
            "folder": str(self.folder),
            "source": self.source,
            "format": self.format,
            **self.record(),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@cpu_by_default()
def tune(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    calibration: Calibration,
    steps: int | None = None,
    learning_rate: float = LEARNING_RATE,
    revision: str | None = None,
    base_revision: str | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = SILENT,
) -> TuneResult:
    """Train what a quantized checkpoint holds in floating point, and write it into the folder `out`, in its format.

    Trained are the grids' scales, rounded to the type in which they are stored, the biases of linear layers, and the
    norms. An eighth of the samples is held out, and the loss on it never rises: where it has not fallen in the end,
    `out` holds what `source` does.

    Args:
        source: a quantized folder, or an id on the hub at `revision`.
        out: the folder to make; it must not exist, unless `force` may replace a model.
        base: the model that `source` was quantized from, not quantized, whose predictions are aimed at; on the hub at
            `base_revision`.
        calibration: the samples, and the seed by which they are taken in some order.
        steps: of Adam, each on about 2,048 tokens; None is as many as see each sample twice.
        learning_rate: at its highest; of scales, relative to what they were.
        shard_size: bytes of tensors in one output file.
        progress: told of every sample, and of every step.

    Raises:
        RequestError: `source` is not quantized, `base` is, or is another network, the samples do not fit, or the steps
            lead nowhere.
        CheckpointError, FormatError, HubError: one of both models cannot be read.
        OutputError: `out` cannot be written.
    """
    started = time.perf_counter()
    _require_legal(steps, learning_rate)
    folder = output_folder(out)
    for each in (source, base):
        require_another_folder(each, folder)
    check_output(folder, force)
    with (
        open_checkpoint(source, revision=revision, progress=progress) as checkpoint,
        open_checkpoint(base, revision=base_revision, progress=progress) as original,
    ):
        format = _require_pair(checkpoint, original)
        require_samples_fit(calibration, GPTNeoConfig.from_dict(checkpoint.config))
        with CheckpointWriter(folder, tensors=len(checkpoint.headers), force=force, shard_size=shard_size) as sink:
            job = _Tuning(checkpoint, format, original, calibration, progress)
            chosen = job.samples.passes(PASSES) if steps is None else steps
            schedule = Schedule(chosen, learning_rate, calibration.seed)
            before, after, curve, replaced = job.run(schedule, progress)
            for name in checkpoint.headers:
                sink.put(name, replaced[name] if name in replaced else checkpoint.view(name))
                checkpoint.forget(name)
            checkpoint.require_unchanged()
            original.require_unchanged()
            result = TuneResult(
                folder=folder,
                source=checkpoint.source_name,
                base=original.source_name,
                base_revision=original.revision,
                format=format.name,
                calibration=calibration.describe(),
                schedule=schedule,
                trained=job.tunable.counts(),
                held=job.samples.held,
                before=before,
                after=after,
                curve=curve,
                notes=tuple(_notes(checkpoint, original)),
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_rss_bytes(),
            )
            files = tuned_files(checkpoint, format, folder.name, result.record(), calibration.documents)
            sink.finish(checkpoint.config, files=files)
    return result


class _Tuning:
    """One model, and the samples that it is trained on."""

    def __init__(
        self, checkpoint: Checkpoint, format: Format, original: Checkpoint, calibration: Calibration, progress: Progress
    ) -> None:
        self.checkpoint, self.format = checkpoint, format
        model = read_model(checkpoint, GPTNeoForCausalLM, dtype=torch.float32, device="cpu", progress=progress)
        self.contents = Contents.of(checkpoint, model, format)
        self.tunable = Tunable(model)
        self.types = {name: checkpoint.headers[stored].dtype for name, stored in self.contents.plain.items()}
        self.predictor = Predictor(model)
        for name, layer in self.tunable.layers.items():
            if reason := format.refuse_tensor(layer.q):
                raise RequestError(f"{checkpoint.source}: {name} could be read, but not written: {reason}")
        reference = read_model(original, GPTNeoForCausalLM, dtype=torch.float32, device="cpu", progress=progress)
        with progress.task("original", total=len(calibration.ids)) as advance:
            self.samples = Samples(calibration.ids, Predictor(reference), advance)

    def run(
        self, schedule: Schedule, progress: Progress
    ) -> tuple[float, float, tuple[tuple[int, float], ...], dict[str, Tensor]]:
        """The losses before and after, the curve of that in between, and the tensors that differ from the stored ones,
        by their names in the file: none where the loss did not fall."""
        came = {name: layer.q for name, layer in self.tunable.layers.items()}
        before = self._measure("before", progress)
        with progress.task("tuning", total=schedule.steps) as advance:
            losses = train(self.predictor, self.tunable.parameters, self.samples, schedule, advance)
        plain = self.tunable.settle(self.types)
        after = self._measure("after", progress)
        replaced = self._replaced(came, plain) if after < before else {}
        return before, after, _curve(losses), replaced

    def _measure(self, label: str, progress: Progress) -> float:
        with progress.task(label, total=self.samples.held) as advance:
            loss = self.samples.held_loss(self.predictor, advance)
        if not math.isfinite(loss):
            raise CheckpointError(f"{self.checkpoint.source}: the predictions {label} tuning are not finite")
        return loss

    def _replaced(self, came: Mapping[str, QuantizedTensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        replaced = {self.contents.plain[name]: tensor for name, tensor in plain.items()}
        for name, layer in self.tunable.layers.items():
            stored = self.contents.layers[name]
            with locate(stored):
                former, now = self.format.encode(came[name]), self.format.encode(layer.q)
            # What did not change stays as whoever wrote it spelled it.
            replaced |= {
                stored + suffix: tensor for suffix, tensor in now.items() if not torch.equal(former[suffix], tensor)
            }
        return replaced


def _require_legal(steps: int | None, learning_rate: float) -> None:
    if steps is not None and steps < 1:
        raise RequestError(f"{steps} steps: at least one is needed")
    if not 0 < learning_rate <= 1:
        raise RequestError(f"learning rate {learning_rate:g}: legal is above 0, up to 1")


def _require_pair(checkpoint: Checkpoint, original: Checkpoint) -> Format:
    """The format of the quantized one. Raises RequestError unless the other is the same network, not quantized."""
    configs = []
    for each in (checkpoint, original):
        with locate(f"{each.source}/config.json"):
            configs.append(GPTNeoConfig.from_dict(each.config))
    with locate(checkpoint.source):
        format = detect(checkpoint.config, checkpoint.headers)
    if format is None:
        raise RequestError(f"{checkpoint.source} is not quantized: quantize it first, then tune what that gives")
    with locate(original.source):
        if detect(original.config, original.headers) is not None:
            raise RequestError(f"is quantized itself: --base is the model that {checkpoint.source} was quantized from")
    for name in _COMPARED:
        mine, theirs = (getattr(config, name) for config in configs)
        if mine != theirs:
            raise RequestError(
                f"{original.source} has {name} {theirs}, {checkpoint.source} {mine}: --base is the model that it was "
                "quantized from"
            )
    for each in (checkpoint, original):
        head = next((name for name in each.headers if name.startswith(("score.", "classifier.", "qa_outputs."))), None)
        if head is not None:
            raise RequestError(f"{each.source} has the head {head.partition('.')[0]}: only language models are tuned")
    return format


def _notes(checkpoint: Checkpoint, original: Checkpoint) -> list[str]:
    """What is unusual about both models."""
    assert checkpoint.folder is not None  # opened with its files
    said = read_record(checkpoint.folder).get("source_hash")
    notes = list(dict.fromkeys((*checkpoint.notes, *original.notes)))
    if said is not None:
        found = join_hashes([hash_tensor(header, original.read(name)) for name, header in original.headers.items()])
        if found != said:
            notes.append(
                f"{checkpoint.source_name} was made from other weights than {original.source_name}'s, or another type"
            )
    return notes


def _curve(losses: list[float]) -> tuple[tuple[int, float], ...]:
    """Mean losses of at most so many parts of a run."""
    size = -(len(losses) // -_PARTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min(len(losses), (number + 1) * size) for number in range(len(parts))]
    return tuple((end, float(f"{sum(part) / len(part):.6g}")) for end, part in zip(ends, parts, strict=True))
