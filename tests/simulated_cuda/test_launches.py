"""A ratchet: launches, waits and copies that a token or a linear layer costs a GPU. Lower a bound, never raise one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from neoquant.evaluation import inspection, scoring
from neoquant.evaluation.corpus import Window
from neoquant.evaluation.scoring import score_batches
from neoquant.generation.generate import Sampling, stream
from neoquant.grids import Grid, make_grid
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model import transfers
from neoquant.model.config import GPTNeoConfig
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT
from neoquant.quantizers import Nearest
from simulated_cuda.device import Counts

BLOCK, REST = 15, 12  # launches a token: of a block, its six products among them, and of all else
ABOVE = {"nf4": 0, "fp4": 0, "mxfp4": 9, "affine": 8, "int8": 3}  # more than the plain product, of one linear layer


def make_model(layers: int, grid: Grid | None = None, hidden: int = 512) -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=99, max_position_embeddings=128, hidden_size=hidden, num_heads=2, num_layers=layers,
        window_size=32, attention_types=[[["global", "local"], layers // 2]],
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=1).eval()
    for name, module in list(model.named_modules()):
        if grid is not None and isinstance(module, nn.Linear) and ".h." in name:
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, QuantLinear(Nearest().quantize(module.weight.detach(), grid), bias))
    return model.to("cuda")


def cost_of_a_token(model: GPTNeoForCausalLM, gpu: Counts, **options: Any) -> tuple[float, float, float]:
    """Launches, waits and copies, of each of the last 16 tokens of 24."""
    ids, totals = torch.zeros(1, 8, dtype=torch.long), []
    for new in (1, 8, 24):  # tables are made once
        gpu.reset()
        assert len(list(stream(model, ids, max_new_tokens=new, **options))) == new
        totals.append(gpu.totals())
    _, a, b = totals
    return (b[0] - a[0]) / 16, (b[1] - a[1]) / 16, (b[2] - a[2]) / 16


def test_a_token_of_the_plain_model(gpu: Counts) -> None:
    few, many = (cost_of_a_token(make_model(layers, hidden=64), gpu, look_every=64) for layers in (2, 4))
    assert few[1:] == many[1:] == (0, 0)
    assert (many[0] - few[0]) / 2 <= BLOCK
    assert 2 * few[0] - many[0] <= REST


@pytest.mark.parametrize("kind", ABOVE)
def test_a_token_of_a_quantized_model(kind: str, gpu: Counts) -> None:
    grid = make_grid(8 if kind == "int8" else 4, kind)
    plain, quantized = (cost_of_a_token(make_model(2, grid), gpu, look_every=64) for grid in (None, grid))
    assert (quantized[0] - plain[0]) / 12 <= ABOVE[kind]
    assert quantized[1:] == (0, 0)


@pytest.mark.parametrize("kind", ABOVE)
def test_a_layer_with_int8_activations(kind: str, gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(512, 512), make_grid(8 if kind == "int8" else 4, kind))
    layer, x = QuantLinear(q).to("cuda"), torch.randn(1, 512, device="cuda")
    layer.set_activations("int8")
    with torch.inference_mode():
        layer(x)  # tables are made once
        gpu.reset()
        layer(x)
    assert gpu.totals()[0] <= 27 and gpu.totals()[1:] == (0, 0)


@pytest.mark.parametrize("watched", ["end", "stop", "sampling", "words"])
def test_one_wait_in_eight_tokens_finds_the_end(watched: str, gpu: Counts) -> None:
    options: dict[str, Any] = {
        "end": {"sampling": Sampling(eos_token_ids=(1000,))},
        "stop": {"stop": lambda seen, keep: torch.zeros(len(seen), dtype=torch.bool)},
        "sampling": {"sampling": Sampling(temperature=1.0, top_k=9, top_p=0.9, repetition_penalty=1.1, seed=1)},
        "words": {"sampling": Sampling(bad_words_ids=((98, 97, 96), (5, 6)), suppress_tokens=(95, 94))},
    }[watched]
    launches, waits, copies = cost_of_a_token(make_model(2, hidden=64), gpu, **options)
    assert (waits, copies) == (1 / 8, 0)
    more = {"sampling": 20 + 2, "words": 14}  # drawing is three: torch.multinomial, of one, waits in some versions
    assert launches <= 2 * BLOCK + REST + more.get(watched, 0)


def test_padded_rows_wait_no_more(gpu: Counts) -> None:
    model = make_model(2, hidden=64)
    ids, keep = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    keep[0, :3] = 0

    def waits(new: int) -> int:
        gpu.reset()
        model.generate(ids, attention_mask=keep, max_new_tokens=new, eos_token_id=[])
        return gpu.waits.total()

    assert waits(8) == waits(24) == waits(40)


def test_reading_a_prompt_costs_as_many_launches_as_a_token(gpu: Counts) -> None:
    model = make_model(2, hidden=64)
    costs = []
    for T in (24, 32):
        gpu.reset()
        with torch.inference_mode():
            model(torch.zeros(1, T, dtype=torch.long, device="cuda"))
        costs.append(gpu.totals())
    assert costs[0] == costs[1]
    assert costs[0][0] <= 2 * BLOCK + REST and costs[0][1:] == (0, 0)


@pytest.mark.parametrize("padded", [False, True])
def test_a_longer_prompt_costs_as_many_launches(padded: bool, gpu: Counts) -> None:
    """Also where local layers see a part of it only: their windows are one call, and no mask is as long as the text."""
    model, costs = make_model(2, hidden=64), []
    for T in (64, 128):
        keep = torch.ones(2, T, dtype=torch.long)
        keep[0, T - 3 :] = 0
        given = {"attention_mask": keep.cuda()} if padded else {}
        ids = torch.zeros(2, T, dtype=torch.long, device="cuda")
        gpu.reset()
        with torch.inference_mode():
            model(ids, use_cache=False, **given)
        costs.append(gpu.totals())
    assert costs[0] == costs[1]
    assert costs[0][0] <= (60 if padded else 50) and costs[0][1:] == (0, 0)


@pytest.mark.parametrize("models", [1, 2])
def test_a_batch_of_evaluation_waits_once_and_while_the_next_is_computed(models: int, gpu: Counts) -> None:
    """However many models, windows and pieces of logits there are; its ids come without a wait."""
    contestants, costs = [make_model(2, hidden=64) for _ in range(models)], []
    for count, rows in ((2, 1024), (6, 1024), (6, 8)):
        windows = [Window(0, torch.arange(30 - i, dtype=torch.int32), 20 - i) for i in range(count)]
        launches = []
        with torch.inference_mode():
            gpu.reset()
            for scores in score_batches(contestants, [windows] * 4, rows, lambda tokens: None):
                launches.append(gpu.launches.total())
                assert gpu.waits.total() == len(launches) and len(scores) == models
                assert len(scores[0].nats) == sum(window.scored for window in windows)
                assert all(part.device.type == "cpu" and part.isfinite().all() for part in scores[-1])
        of_one = launches[-1] // 4
        assert launches == [2 * of_one, 3 * of_one, 4 * of_one, 4 * of_one]
        costs.append((gpu.waits.total(), gpu.copies.total(), gpu.transfers.total()))
    assert costs == [(4, 0, 4 * (3 + 5 * models))] * 3


def test_inspection_waits_as_often_however_much_it_reads(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for losses on their way to the host, while the next ones are computed."""
    base, other = make_model(2, hidden=64), make_model(2, make_grid(4, "nf4"), hidden=64)
    found = []
    for count, rows in ((2, 1024), (4, 16)):
        limits = scoring.BatchLimits(positions=64, rows=rows)
        monkeypatch.setattr(inspection, "batch_limits", lambda device, limits=limits: limits)
        windows = [Window(i, torch.arange(30 - i, dtype=torch.int32), 20 - i) for i in range(count)]
        gpu.reset()
        layers, together = inspection._Inspector(base, other, windows, sensitivity=True).run(SILENT)
        assert len(layers) == 12 and together.kl > 0 and all(layer.loss is not None for layer in layers)
        assert gpu.copies.total() == 0 or count == 2  # tables are made once
        found.append({line: n for line, n in gpu.waits.items() if not line.startswith("model/transfers.py")})
    assert found[0] == found[1] and sum(found[0].values()) <= 2 * 6 * 7


def losses_of_batches(model: Any) -> torch.Tensor:
    """Of four batches of five tokens, each read when it is given."""
    work = [[Window(0, torch.arange(9 + i, dtype=torch.int32) + i, 5)] for i in range(4)]
    with torch.inference_mode():
        return torch.stack(
            [scores.nats.clone() for (scores,) in score_batches([model], work, 1024, lambda tokens: None)]
        )


def test_scores_are_read_when_they_are_there(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(2, hidden=64)
    assert torch.equal(losses_of_batches(model), losses_of_batches(copy.deepcopy(model).to("cpu")))
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    assert losses_of_batches(model).isnan().all()  # who does not wait reads what is not there


def test_an_event_that_comes_too_early_is_caught(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is one that is recorded before the copies, and waits for none of them."""
    begin = transfers._UnderWay.__init__

    def recorded_first(self: Any, tensors: Any) -> None:
        event = torch.cuda.Event()
        event.record()
        begin(self, tensors)
        self._event = event

    monkeypatch.setattr(transfers._UnderWay, "__init__", recorded_first)
    assert losses_of_batches(make_model(2, hidden=64)).isnan().all()


def test_pinned_memory_that_is_used_again_too_early_is_caught(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: dict[Any, torch.Tensor] = {}

    def through_one_buffer(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor
        buffer = buffers.setdefault(tensor.dtype, torch.empty(64, dtype=tensor.dtype, pin_memory=True))
        part = buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
        return part.to(device, non_blocking=True)

    monkeypatch.setattr(scoring, "to_device", through_one_buffer)
    with pytest.raises(AssertionError, match="pinned memory was written while it was copied"):
        losses_of_batches(make_model(2, hidden=64))


@pytest.mark.parametrize("kind", ["nf4", "affine", "int8"])
def test_an_embedding_looks_rows_up_without_waiting(kind: str, gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(99, 64), make_grid(8 if kind == "int8" else 4, kind))
    layer = QuantLinear(q).to("cuda")
    ids = torch.tensor([[3, 98]], device="cuda")
    layer.embedding(ids, torch.float32)  # tables are made once
    gpu.reset()
    layer.embedding(ids, torch.float32)
    assert gpu.totals()[1:] == (0, 0) and gpu.totals()[0] <= 29
    with pytest.raises(RuntimeError, match="ids are 0 to 98"):
        layer.embedding(ids + 1, torch.float32)
