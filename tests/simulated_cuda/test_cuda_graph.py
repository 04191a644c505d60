"""Tokens by a recorded CUDA graph are those that are computed launch by launch; and they can be recorded at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neoquant.errors import CheckpointError, RequestError
from neoquant.generation import cuda_graph
from neoquant.generation.generate import Sampling, stream
from neoquant.grids import make_grid
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from simulated_cuda.device import Counts

CONTEXT, WINDOW = 96, 6


def make_model(**options: Any) -> GPTNeoForCausalLM:
    """Predictions that depend on all that is seen: weights are large enough for sharp attention."""
    config = GPTNeoConfig(
        vocab_size=99, max_position_embeddings=CONTEXT, hidden_size=32, num_heads=2, num_layers=4, window_size=WINDOW,
        attention_types=[[["global", "local"], 2]],
    )  # fmt: skip
    model = GPTNeoForCausalLM(config, **options).init_weights(seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


def tokens(model: GPTNeoForCausalLM, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return torch.stack(list(stream(model, ids, max_new_tokens=new, **options)), 1)


@pytest.mark.parametrize("T, attention", [(1, "sdpa"), (WINDOW - 1, "eager"), (WINDOW, "sdpa"), (19, "sdpa")])
def test_tokens_are_the_same(T: int, attention: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where local layers wrap around, and where buffers are full and grow, twice."""
    monkeypatch.setattr(cuda_graph, "LEAST_CAPACITY", 16)
    model = make_model(attn_implementation=attention)
    ids = torch.randint(0, 99, (2, T), generator=torch.Generator().manual_seed(T))
    expected = tokens(model, ids, 40)
    assert len(expected.unique()) > 15
    model.to("cuda")
    assert torch.equal(tokens(model, ids, 40, static_cache=True), expected)


def test_so_they_are_with_padding_positions_and_types(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "LEAST_CAPACITY", 8)
    model, random = make_model(), torch.Generator().manual_seed(1)
    ids, types = (torch.randint(0, 99, (3, 9), generator=random) for _ in range(2))
    keep = torch.ones(3, 9, dtype=torch.long)
    keep[0, :4], keep[1, 7:] = 0, 0
    given = {"attention_mask": keep, "token_type_ids": types}
    expected = tokens(model, ids, 30, **given)
    further = tokens(model, ids, 30, position_ids=torch.arange(20, 29)[None])
    model.to("cuda")
    assert torch.equal(tokens(model, ids, 30, static_cache=True, **given), expected)
    assert torch.equal(tokens(model, ids, 30, static_cache=True, position_ids=torch.arange(20, 29)[None]), further)


def test_rows_that_end_are_filled_up(gpu: Counts) -> None:
    model, ids = make_model(), torch.tensor([[5, 6], [7, 8], [9, 1]])
    end = int(tokens(model, ids, 12)[1, 5])
    sampling = Sampling(eos_token_ids=(end,), pad_token_id=3, min_new_tokens=2)
    expected = tokens(model, ids, 12, sampling=sampling)
    assert (expected[1, 6:] == 3).all()
    assert torch.equal(tokens(model.to("cuda"), ids, 12, sampling=sampling, static_cache=True), expected)


def test_rows_that_end_at_once_are_not_recorded(gpu: Counts) -> None:
    """They have left when the recording begins; those that end later are computed to the end."""
    model, ids = make_model(), torch.tensor([[5, 6], [7, 8], [9, 1]])
    whole = tokens(model, ids, 12)
    first, later = int(whole[0, 0]), int(whole[2, 5])
    sampling = Sampling(eos_token_ids=(first, later), pad_token_id=3)
    expected = tokens(model, ids, 12, sampling=sampling)
    assert (expected[0, 1:] == 3).all() and (expected[1] != 3).any()
    found = tokens(model.to("cuda"), ids, 12, sampling=sampling, look_every=1, static_cache=True)
    assert torch.equal(found, expected)


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=0.8, seed=3),
    "filtered": Sampling(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=4, min_new_tokens=1),
    "torch's generator": Sampling(temperature=0.8),
    "repetition": Sampling(repetition_penalty=1.3),
    "no repeats": Sampling(no_repeat_ngram_size=2),
    "forbidden words": Sampling(bad_words_ids=((8, 7), (6,))),
    "forbidden tokens": Sampling(suppress_tokens=(7,)),
    "least length": Sampling(eos_token_ids=(7,), min_new_tokens=9),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_chosen_in_the_graph_tokens_are_the_same(name: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where buffers grow and all is recorded anew; what needs more than the logits is chosen outside."""
    monkeypatch.setattr(cuda_graph, "LEAST_CAPACITY", 16)
    chosen, given = [], cuda_graph.GraphedSteps.chosen
    monkeypatch.setattr(cuda_graph.GraphedSteps, "chosen", lambda *args: chosen.append(1) or given(*args))
    model, ids, sampling = make_model().to("cuda"), torch.tensor([[5, 6], [7, 8]]), SAMPLINGS[name]
    found = []
    for static in (False, True):
        torch.manual_seed(9)
        found.append(tokens(model, ids, 40, sampling=sampling, static_cache=static))
    inside = name in ("greedy", "drawn", "filtered")
    assert len(chosen) == (39 if inside else 0)
    assert torch.equal(found[0], found[1])


def test_a_token_chosen_in_the_graph_is_two_launches(gpu: Counts) -> None:
    """However it is chosen: the graph, and keeping the token."""
    model, ids = make_model().to("cuda"), torch.zeros(1, 8, dtype=torch.long)
    for sampling in (SAMPLINGS["greedy"], SAMPLINGS["filtered"]):
        totals = []
        for new in (1, 8, 24):  # tables are made once
            gpu.reset()
            made = stream(model, ids, max_new_tokens=new, look_every=64, static_cache=True, sampling=sampling)
            assert len(list(made)) == new
            totals.append(gpu.totals())
        assert [(b - a) / 16 for a, b in zip(*totals[1:], strict=True)] == [2, 0, 0]


def test_what_is_recorded_is_the_work_of_the_models_device(gpu: Counts) -> None:
    """Whichever device is the current one."""
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    expected = tokens(model, ids, 12)
    model.to("cuda")
    with torch.cuda.device(1):
        assert torch.equal(tokens(model, ids, 12, static_cache=True), expected)
        with pytest.raises(RuntimeError, match="a graph records on cuda:1"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass


def test_a_generator_must_be_registered(gpu: Counts) -> None:
    graph, generator = torch.cuda.CUDAGraph(), torch.Generator("cuda").manual_seed(1)
    with pytest.raises(RuntimeError, match="not registered"), torch.cuda.graph(graph):
        torch.ones(3, device="cuda").exponential_(generator=generator)


def test_predictions_that_are_not_finite_are_refused(gpu: Counts) -> None:
    model, ids = make_model().to("cuda"), torch.tensor([[5, 6, 7]])
    model.transformer.wpe.weight.memory[6] = torch.nan
    for static in (False, True):
        with pytest.raises(CheckpointError, match="new token 5 cannot be chosen"):
            tokens(model, ids, 12, static_cache=static)


def test_one_token_records_nothing(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "record", None)
    monkeypatch.setattr(cuda_graph.GraphedSteps, "__init__", None)
    assert tokens(make_model().to("cuda"), torch.tensor([[5, 6]]), 1, static_cache=True).shape == (1, 1)


@pytest.mark.parametrize("kind", ["nf4", "affine"])
def test_a_token_is_one_launch_and_what_chooses_it(kind: str, gpu: Counts) -> None:
    """However many layers there are; the host never waits, and nothing is copied from it."""
    model, grid = make_model(), make_grid(8 if kind == "int8" else 4, kind)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".h." in name:
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, QuantLinear(Nearest().quantize(module.weight.detach(), grid), bias))
    model.to("cuda")
    ids, totals = torch.zeros(1, 8, dtype=torch.long), []
    for new in (1, 8, 24):  # tables are made once
        gpu.reset()
        assert len(list(stream(model, ids, max_new_tokens=new, look_every=64, static_cache=True))) == new
        totals.append(gpu.totals())
    launches, waits, copies = ((b - a) / 16 for a, b in zip(*totals[1:], strict=True))
    assert launches <= 2 and (waits, copies) == (0, 0)


def test_what_waits_for_the_host_cannot_be_recorded(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated recording refuses what CUDA refuses, and forgets what a number of the host's decided."""
    model = make_model().to("cuda")
    whole = model.transformer.ln_f.forward

    def peeks(x: torch.Tensor) -> torch.Tensor:
        return whole(x) if float(x[0, 0, 0]) < torch.inf else x

    monkeypatch.setattr(model.transformer.ln_f, "forward", peeks)
    with pytest.raises(RuntimeError, match="when stream is capturing"):
        tokens(model, torch.zeros(1, 3, dtype=torch.long), 3, static_cache=True)


def test_what_is_recorded_must_not_count_on_the_host(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that the host knows would be the same for ever: such a mistake gives other tokens here."""
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    expected = tokens(model, ids, 20)
    model.to("cuda")
    stays = cuda_graph.GraphedSteps._step

    def step(self: cuda_graph.GraphedSteps) -> None:
        self._next = torch.full((1, 1), self.cache.length, device="cuda")
        stays(self)

    monkeypatch.setattr(cuda_graph.GraphedSteps, "_step", step)
    assert not torch.equal(tokens(model, ids, 20, static_cache=True), expected)


def test_what_cannot_be_recorded_is_refused(gpu: Counts) -> None:
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    assert torch.equal(tokens(model, ids, 4, static_cache=True), tokens(model, ids, 4))  # on a CPU nothing changes
    model.to("cuda")
    with pytest.raises(RequestError, match="keys and values are held in int8"):
        tokens(model, ids, 4, static_cache=True, cache_dtype="int8")
    with pytest.raises(RequestError, match="it is being trained"):
        tokens(model.train(), ids, 4, static_cache=True)
    with pytest.raises(RequestError, match="drafts are checked together, which a static"):
        model.eval().generate(ids, cache_implementation="static", prompt_lookup_num_tokens=3)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, cache_implementation="static").cpu()[:, 3:], tokens(model, ids, 4)
    )


def test_scores_are_kept_of_each_token(gpu: Counts) -> None:
    """A replay overwrites what the one before it gave."""
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": []}
    expected = model.generate(ids, **options)
    found = model.to("cuda").generate(ids, cache_implementation="static", **options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(ours.cpu(), theirs, atol=1e-4)
