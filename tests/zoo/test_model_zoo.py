"""Model folders of every kind, opened by transformers and by neoquant: the same numbers, or an error that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_4
from model_folders import QUANTIZED, WHOLE_BLOCKS, models
from transformers_4 import skip_if_otherwise

import neoquant
from neoquant.benchmark.worker import cache_name
from neoquant.errors import CheckpointError, NeoquantError

transformers = pytest.importorskip("transformers")

MODELS = models()
ONLY_OURS = "only neoquant"
IDS = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(0))
OUTPUTS = ("loss", "logits", "last_hidden_state", "start_logits", "end_logits")
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


EQUAL = [name for name, model in MODELS.items() if model.error is None]
CAUSAL = [name for name in EQUAL if MODELS[name].head == "CausalLM"]
REFUSED = [name for name, model in MODELS.items() if model.error is not None]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> its folder, written once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name].make(root / str(len(made)))
        return made[name]

    return folder


def ours(folder: Path, head: str = "CausalLM", dtype: Any = "auto") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", neoquant.LoadWarning)
        return getattr(neoquant, f"AutoModelFor{head}" if head else "AutoModel").from_pretrained(folder, dtype=dtype)


def theirs(folder: Path, head: str = "CausalLM", dtype: Any = "auto") -> Any:
    loader = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return loader.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def outputs(model: Any, head: str) -> dict[str, torch.Tensor]:
    asked: dict[str, Any] = {}
    if head in ("CausalLM", "TokenClassification"):
        asked["labels"] = IDS % (3 if head == "TokenClassification" else 61)
    if head == "SequenceClassification":
        asked["labels"] = torch.tensor([0, 2])
    with torch.no_grad():
        out = model(IDS, **asked)
    return {name: getattr(out, name).double() for name in OUTPUTS if getattr(out, name, None) is not None}


def require_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert a.keys() == b.keys() and a
    for name, expected in b.items():
        assert a[name].shape == expected.shape
        assert (a[name] - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1), name


@pytest.mark.parametrize("name", EQUAL)
def test_logits_and_losses_are_transformers(name: str, folder_of: Callable[[str], Path]) -> None:
    skip_if_otherwise(name, transformers_4.MODELS)
    head = MODELS[name].head
    a, b = ours(folder_of(name), head), theirs(folder_of(name), head)
    assert a.dtype == b.dtype
    require_close(outputs(a, head), outputs(b, head), b.dtype)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_ids_are_transformers(name: str, folder_of: Callable[[str], Path]) -> None:
    skip_if_otherwise(name, transformers_4.MODELS)
    a, b = ours(folder_of(name), dtype=torch.float32), theirs(folder_of(name), dtype=torch.float32)
    asked: dict[str, Any]
    for row, asked in zip(IDS, ({}, {"max_new_tokens": 12}), strict=True):
        expected = b.generate(row[None], attention_mask=torch.ones(1, len(row)), do_sample=False, **asked)
        try:
            got = a.generate(row[None], do_sample=False, **asked)
        except NeoquantError as error:
            assert any(word in str(error) for word in MODELS[name].config), error
            continue
        assert getattr(got, "sequences", got).tolist() == getattr(expected, "sequences", expected).tolist()


@pytest.mark.parametrize(
    "name", ["as transformers saves it", "use_cache false", "use_cache true", "output_hidden_states"]
)
def test_a_loop_with_a_cache_gives_transformers_ids(name: str, folder_of: Callable[[str], Path]) -> None:
    found = []
    for model in (ours(folder_of(name), dtype=torch.float32), theirs(folder_of(name), dtype=torch.float32)):
        ids, past, chosen = IDS[:1], None, []
        with torch.no_grad():
            for _ in range(4):
                out = model(ids, **{cache_name(model): past})
                past = getattr(out, cache_name(model))
                ids = out.logits[:, -1:].argmax(-1)
                chosen.append(int(ids))
        found.append((chosen, past is None, out.hidden_states is None))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", EQUAL)
def test_each_reads_what_the_other_saved(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    skip_if_otherwise(name, transformers_4.MODELS)
    head = MODELS[name].head
    a, b = ours(folder_of(name), head), theirs(folder_of(name), head)
    a.save_pretrained(tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    expected = outputs(b, head)
    read_by_them, read_by_us = theirs(tmp_path / "ours", head), ours(tmp_path / "theirs", head)
    assert read_by_them.dtype == read_by_us.dtype == b.dtype
    require_close(outputs(read_by_them, head), expected, b.dtype)
    require_close(outputs(read_by_us, head), expected, b.dtype)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str, folder_of: Callable[[str], Path]) -> None:
    if MODELS[name].error == ONLY_OURS:  # the tensors are all there, and neoquant finds them
        got, expected = ours(folder_of(name)), ours(folder_of("as transformers saves it"))
        assert torch.equal(got(IDS).logits, expected(IDS).logits)
        return
    with pytest.raises(NeoquantError, match=MODELS[name].error) as caught:
        ours(folder_of(name))
    assert "\n" not in str(caught.value)
    assert str(folder_of(name)) in str(caught.value) or not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("dtype", WHOLE_BLOCKS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_folders_are_read_alike(name: str, dtype: str, tmp_path: Path) -> None:
    """In training mode bitsandbytes multiplies exactly, and GPT-Neo without dropout computes the same.

    Rows are whole blocks: bitsandbytes 0.50 decodes others wrongly on a CPU.
    """
    source = WHOLE_BLOCKS[dtype].make(tmp_path / "plain")
    neoquant.quantize(source, tmp_path / "quantized", neoquant.Recipe.simple(**QUANTIZED[name]))
    a, b = ours(tmp_path / "quantized", dtype=torch.float32), theirs(tmp_path / "quantized", dtype=torch.float32)
    torch.nn.Module.float(b)
    with torch.no_grad():
        got, expected = a(IDS).logits, b.train()(IDS).logits
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_there_are_enough_folders() -> None:
    assert transformers_4.MODELS.keys() <= set(EQUAL)
    assert len(MODELS) + 2 * len(QUANTIZED) >= 60
