"""Made-up results with every field filled, to render: no model runs."""

from __future__ import annotations

import hashlib
from typing import Any

from neoquant.data.suite import Suite
from neoquant.evaluation.inspection_result import Inspection, Layer, Loss
from neoquant.evaluation.result import (
    Candidate,
    Change,
    Choice,
    Comparison,
    DataInfo,
    Distribution,
    Environment,
    Evaluation,
    Histogram,
    Macro,
    MacroChange,
    ModelInfo,
    Resampling,
    Score,
    TokenChange,
    WorstDocument,
    WorstToken,
)
from neoquant.model.names import BLOCK_LINEARS

HOSTILE = "<script>alert('x')</script>&\"\x00\x1b[31m$\\alpha$\u202e\ud800"
SUBSETS = ("Gutenberg (PG-19)", "ArXiv")
QUANTILES = {q: 10.0 ** (number - 8) for number, q in enumerate(
    ("0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9"))}  # fmt: skip


def make_evaluation(name: str, nats: float = 3_000_000, subsets: tuple[str, ...] = SUBSETS, **model: Any) -> Evaluation:
    scores = [Score(subset=s, documents=10, tokens=1_234_567, bytes=5_234_567, nats=nats) for s in (*subsets, "total")]
    described = {"bytes_on_disk": 838_100_000, "bits_per_weight_linears": 4.127, "bits_per_weight_model": 5.1}
    return Evaluation(
        model=ModelInfo(
            name=name, **{**described, "sha256": hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), **model}
        ),
        suite=Suite(name="pile-core", context=2048, data={"kind": "file", "path": "x"}),
        data=DataInfo(source="x.jsonl", revision=None, sha256="ab" * 32, tokenizer_sha256="cd"),
        environment=Environment(
            neoquant="0.1", torch="2", python="3", platform="Linux", device="cpu", dtype="float32", threads=2
        ),
        total=scores[-1],
        macro=Macro(nats_per_token=2.43, bits_per_byte=0.83),
        subsets=tuple(scores[:-1]),
        units=(),
        seconds=12.3,
        created="2026-01-01T00:00:00+00:00",
    )


def make_change(subset: str, nats: float = 0.0123, *, full: bool = True, **fields: Any) -> Change:
    spread: dict[str, Any] = {}
    if full:
        counts = Histogram(edges=(-0.2, -0.1, 0.0, 0.1), counts=(3, 40, 2), below=1, above=5)
        logs = Histogram(edges=(1e-6, 1e-4, 1e-2, 1.0), counts=(30, 14, 1), below=0, above=0)
        kwargs = {"mean": 1e-3, "rms": 2e-3, "minimum": -0.5, "maximum": 7.0, "quantiles": QUANTILES}
        spread = {
            "agreement": 0.968,
            "agreement_low": 0.9656,
            "agreement_high": 0.9704,
            "kl": 0.00065,
            "kl_low": 0.0006,
            "kl_high": 0.00071,
            "divergence": Distribution(**kwargs, histogram=logs),
            "loss_change": Distribution(**kwargs, histogram=counts),
            "probability_change": Distribution(**kwargs),
        }
    interval: dict[str, Any] = {"low": nats - 0.002, "high": nats + 0.003}
    sizes = {"bits_per_byte": 0.01, "bits_per_byte_low": 0.0, "bits_per_byte_high": 0.02}
    return Change(subset=subset, nats_per_token=nats, **{**interval, **sizes, **spread, **fields})


def make_candidate(
    name: str, nats: float = 0.0123, *, text: str = " the", full: bool = True, **model: Any
) -> Candidate:
    passage = tuple(
        TokenChange(text=t, loss_change=change, kl=0.1)
        for t, change in (("Once", None), (" upon\n", -2.0), (text, 1.5), (" end", 0.01))
    )
    token = WorstToken(
        unit="line 7",
        subset=SUBSETS[1],
        position=41,
        token=text,
        kl=3.21,
        probability_reference=0.31,
        probability=0.02,
        top_reference=Choice(text=text, probability=0.31),
        top=Choice(text=" a", probability=0.4),
        top_tokens_reference=tuple(
            Choice(text=t, probability=p) for t, p in ((text, 0.31), (" of", 0.2), (" in", 0.1))
        ),
        top_tokens=tuple(Choice(text=t, probability=p) for t, p in ((" a", 0.4), ("\\xe2", 0.25), (text, 0.02))),
        passage=passage,
        index=2,
    )
    document = WorstDocument(
        unit="line 9", subset=SUBSETS[0], tokens=99, nats_per_token=0.5, kl=0.4, beginning=text * 40
    )
    return Candidate(
        evaluation=make_evaluation(name, 3_015_000, **model),
        total=make_change("total", nats, full=full),
        macro=MacroChange(
            nats_per_token=nats,
            low=None,
            high=None,
            bits_per_byte=0.01,
            bits_per_byte_low=None,
            bits_per_byte_high=None,
        ),
        subsets=tuple(make_change(subset, nats, full=full) for subset in SUBSETS),
        worst_documents=(document,) if full else (),
        worst_tokens=(token,) if full else (),
    )


def make_comparison(*candidates: Candidate, base: str = "gpt-neo-1.3B") -> Comparison:
    reference = make_evaluation(base, bytes_on_disk=2_631_000_000, bits_per_weight_linears=16)
    return Comparison(reference=reference, candidates=candidates, resampling=Resampling(unit="document"))


def make_inspection(name: str, base: str = "gpt-neo-1.3B", *, sensitivity: bool = True) -> Inspection:
    reference, other = make_evaluation(base), make_evaluation(name)
    grid = {"name": "nf4", "block_size": 64, "double_quant": True}
    layers = [
        Layer(
            block=block,
            projection=projection,
            attention=("global", "local")[block],
            shape=(8, 8),
            grid=None if projection.endswith("c_fc") else grid,
            weight_error=0.0 if projection.endswith("c_fc") else 0.0085,
            output_error=0.0 if projection.endswith("c_fc") else 0.0123 / (1 + block),
            loss=Loss(nats_per_token=0.001, low=None, high=None, kl=0.00321) if sensitivity else None,
        )
        for block in range(2)
        for projection in BLOCK_LINEARS
    ]
    return Inspection(
        model=other.model,
        base=reference.model,
        suite=other.suite,
        data=other.data,
        environment=other.environment,
        windows=2,
        tokens=4096,
        layers=tuple(layers),
        together=Loss(nats_per_token=0.01, low=0.0, high=0.02, kl=0.04),
        notes=("something to know",),
        seconds=1.0,
        created="2026-01-01T00:00:00+00:00",
    )
