"""Quantizing from disk to disk: sizes as predicted, bytes as in memory, memory bounded, and whole or not at all."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import neoquant
from neoquant.calibration.dataset import Calibration
from neoquant.checkpoint import hub, open_checkpoint
from neoquant.checkpoint.headers import TensorHeader
from neoquant.checkpoint.shard import Shard
from neoquant.errors import CheckpointError, OutputError, RequestError
from neoquant.progress import Progress
from neoquant.quantization import quantize as quantization
from neoquant.quantization import streaming
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe, recipe_names
from neoquant.quantization.sequential import needs_calibration
from neoquant.quantizers import Nearest

NF4 = Recipe.simple(4, "nf4")
MakeModel = Callable[..., Path]

# Ragged blocks, odd widths, every type, and one wide enough that the weights outweigh their headers.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "odd": {"hidden_size": 15, "num_heads": 3, "intermediate_size": 7, "vocab_size": 101},
    "wide": {"hidden_size": 192, "num_heads": 4, "vocab_size": 1000, "num_layers": 4, "dtype": "bfloat16"}
    | {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "float32": {"hidden_size": 64, "num_heads": 4, "dtype": "float32"},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def damage(folder: Path, name: str, value: float) -> None:
    """Put `value` into one weight of a model."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("recipe", "shard_size"), [*((name, 5_000_000_000) for name in recipe_names()), ("nf4", 1), ("mixed", 30_000)]
)
@pytest.mark.parametrize("model", MODELS)
def test_predicted_size(make_model: MakeModel, tmp_path: Path, model: str, recipe: str, shard_size: int) -> None:
    source = make_model(**MODELS[model])
    planned = quantization.plan(source, Recipe.load(recipe), shard_size=shard_size)
    shown = Calibration(torch.arange(32).view(2, 16), "made up", "0" * 64, 0) if needs_calibration(planned) else None
    result = quantize(source, tmp_path / "out", Recipe.load(recipe), shard_size=shard_size, calibration=shown)
    assert result.output_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert planned.output_bytes == pytest.approx(result.output_bytes, rel=0.01)
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("model*"))
    assert planned.weights_bytes == pytest.approx(weights, rel=0.01)
    assert result.plan.weights_bytes == weights
    assert planned.bits_per_weight_linears == pytest.approx(result.plan.bits_per_weight_linears, rel=0.01)


@pytest.mark.parametrize("shard_size", [1, 20_000, 5_000_000_000])
@pytest.mark.parametrize("recipe", ["nf4-edges", "mixed"])
def test_streamed_is_in_memory(make_model: MakeModel, tmp_path: Path, recipe: str, shard_size: int) -> None:
    source = make_model()
    result = quantize(source, tmp_path / "out", Recipe.load(recipe), shard_size=shard_size)
    weights = load_file(source / "model.safetensors")
    expected = {}
    for row in result.plan.rows:
        if row.grid is None:
            expected[row.name] = weights[row.name]
        else:
            quantized = Nearest().quantize(weights[row.name], row.grid)
            prefix = row.name.removesuffix(".weight")
            expected |= {prefix + end: value for end, value in result.plan.format.encode(quantized).items()}
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_two_runs_give_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for run in "ab":
        quantize(tiny_model, tmp_path / run / "out", NF4, shard_size=20_000)
    names = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b" / "out").iterdir())
    same, different, failed = filecmp.cmpfiles(tmp_path / "a" / "out", tmp_path / "b" / "out", names, shallow=False)
    assert (sorted(same), different, failed) == (names, [], [])


@pytest.mark.parametrize("in_flight", [0, 1000])
def test_how_much_is_in_flight_changes_no_byte(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    quantize(tiny_model, tmp_path / "a" / "out", NF4, shard_size=20_000)
    monkeypatch.setattr(streaming, "IN_FLIGHT_BYTES", in_flight)
    quantize(tiny_model, tmp_path / "b" / "out", NF4, shard_size=20_000)
    names = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert filecmp.cmpfiles(tmp_path / "a" / "out", tmp_path / "b" / "out", names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("in_flight", [0, 10**9])
def test_a_disk_that_fills_up_meanwhile_is_told_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    """Writing runs behind, in a thread of its own: what fails there must not get lost."""

    def full(self: Shard, header: TensorHeader, tensor: torch.Tensor) -> None:
        if header.name.startswith("transformer.h.1.mlp.c_fc"):
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, header, tensor)

    add = Shard.add
    monkeypatch.setattr(Shard, "add", full)
    monkeypatch.setattr(streaming, "IN_FLIGHT_BYTES", in_flight)
    with pytest.raises(OutputError, match=r"the disk is full: cannot write tensor 'transformer\.h\.1\.mlp\.c_fc"):
        quantize(tiny_model, tmp_path / "out" / "model", NF4)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_folder_holds(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny-nf4"
    result = quantize(tiny_model, out, NF4)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "neoquant.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (out, tiny_model))
    assert config.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert config == source
    record = json.loads((out / "neoquant.json").read_text())
    assert record["source"] == tiny_model.name
    assert record["source_hash"] == result.source_hash
    assert str(tiny_model.parent) not in (out / "neoquant.json").read_text() + (out / "README.md").read_text()
    assert Recipe.parse(record["recipe"]) == NF4
    stored = tensors_of(out)
    assert sum(row["bytes"] for row in record["tensors"]) == sum(value.nbytes for value in stored.values())
    card = (out / "README.md").read_text()
    for words in ("library_name: transformers", "pipeline_tag: text-generation", "# tiny-nf4", 'type = "nf4"'):
        assert words in card
    assert f"{result.plan.bits_per_weight_linears:.3f} bits" in card
    assert "Not measured yet: run `neoquant compare" in card
    assert result.peak_rss_bytes > 1e7
    assert result.seconds > 0


def test_the_source_hash_is_of_its_tensors(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    first = quantize(source, tmp_path / "first", NF4).source_hash
    (source / "tokenizer.json").unlink()
    assert quantize(source, tmp_path / "second", Recipe.simple(8, "int8")).source_hash == first
    lines = []
    with open_checkpoint(source) as checkpoint:
        for name, header in checkpoint.headers.items():
            stored = checkpoint.read(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            kind = str(header.dtype).removeprefix("torch.")
            lines.append(f"{name} {kind} {list(header.shape)} {xxhash.xxh3_128_hexdigest(stored)}\n")
    assert first == "xxh3_128:" + xxhash.xxh3_128_hexdigest("".join(lines).encode())
    damage(source, "transformer.ln_f.bias", 1.0)
    assert quantize(source, tmp_path / "third", NF4).source_hash != first


def test_an_error_while_hashing_ends_the_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(header: Any, weight: torch.Tensor) -> bytes:
        if header.name.endswith("ln_f.bias"):
            raise MemoryError("out of luck")
        return b""

    monkeypatch.setattr("neoquant.quantization.streaming.hash_tensor", failing)
    with pytest.raises(MemoryError, match="out of luck"):
        quantize(make_model(), tmp_path / "made" / "nf4", NF4)
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    "head", ["", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
@pytest.mark.parametrize("recipe", ["nf4-edges", "int8"])
def test_transformers_reads_every_head(tmp_path: Path, head: str, recipe: str) -> None:
    """What transformers saves can be quantized, and what comes out it loads: prefixes, heads, layers kept."""
    import transformers

    import neoquant

    config = transformers.GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=8, num_labels=3, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    cls = getattr(transformers, f"GPTNeo{head or 'Model'}")
    cls(config).save_pretrained(tmp_path / "source")
    result = quantize(tmp_path / "source", tmp_path / "out", Recipe.load(recipe))
    assert sum(row.action == "quantize" for row in result.plan.rows) == (5 if recipe == "nf4-edges" else 12)
    names = tensors_of(tmp_path / "out").keys()
    assert any(name.startswith("transformer.") for name in names) is bool(head)
    assert "lm_head.weight" not in names

    card = (tmp_path / "out" / "README.md").read_text()
    ours = f"model = neoquant.GPTNeo{head or 'Model'}.from_pretrained"
    assert ("model, tokenizer = neoquant.load" if head == "ForCausalLM" else ours) in card
    getattr(neoquant, f"GPTNeo{head or 'Model'}").from_pretrained(tmp_path / "out")

    loaded, notes = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert not notes["mismatched_keys"]
    base = loaded if not head else loaded.transformer
    for row in result.plan.rows:
        layer = row.layer.removeprefix("transformer.")
        if row.is_linear:
            assert ("bit" in type(base.get_submodule(layer)).__name__) == (row.action == "quantize"), row
    assert loaded(torch.arange(1, 9)[None])[0].isfinite().all()


def test_old_checkpoints(make_model: MakeModel, tmp_path: Path) -> None:
    """pytorch_model.bin in float32 with mask buffers and the tied head written out."""
    source = make_model(dtype="float32", torch_dtype="float32")
    tensors = load_file(source / "model.safetensors")
    expected = {name: value.clone() for name, value in tensors.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    tensors["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    result = quantize(source, tmp_path / "out", NF4)
    stored = tensors_of(tmp_path / "out")
    assert not [
        name for name in stored if "masked_bias" in name or name.endswith("attention.bias") or "lm_head" in name
    ]
    assert torch.equal(stored["transformer.wte.weight"], expected["transformer.wte.weight"].half())
    name = "transformer.h.1.mlp.c_fc"
    quantized = result.plan.format.decode(
        {key.removeprefix(name): value for key, value in stored.items() if key.startswith(f"{name}.weight")}
    )
    assert quantized.equals(Nearest().quantize(expected[f"{name}.weight"], quantized.grid))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert any(note.startswith("lm_head.weight is not written") for note in result.plan.notes)
    assert any(note.startswith("2 old mask buffers") for note in result.plan.notes)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.simple(4, "nf4"),
        Recipe.simple(8, "int8"),
        Recipe.simple(4, "affine", group_size=32, format="gptq"),
        Recipe.simple(4, "affine", group_size=32, format="compressed-tensors"),
        Recipe.simple(4, "mxfp4"),
    ],
    ids=lambda recipe: f"{recipe.name}-{recipe.format}",
)
def test_what_else_stands_inside_a_layer_is_kept_and_no_part_of_it(
    make_model: MakeModel, tmp_path: Path, recipe: Recipe
) -> None:
    """An adapter that is not merged, or another program's scale: transformers reads past it, with a warning."""
    folder = make_model(hidden_size=32, num_heads=4)
    inside = "transformer.h.0.attn.attention.q_proj"
    extra = {f"{inside}.lora_A.weight": torch.ones(2, 32), f"{inside}.input_scale": torch.ones(1)}
    plain = quantize(folder, tmp_path / "plain", recipe)
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", metadata={"format": "pt"})
    made = quantize(folder, tmp_path / "made", recipe)
    assert any("2 tensors are no part" in note for note in made.plan.notes)
    with pytest.warns(
        neoquant.LoadWarning, match=rf"also holds {inside}\.input_scale, {inside}\.lora_A\.weight, which"
    ):
        model = neoquant.GPTNeoForCausalLM.from_pretrained(made.folder)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, neoquant.GPTNeoForCausalLM.from_pretrained(plain.folder)(ids).logits)


def test_heads_tied_and_not(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "tied", NF4)
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    damage(source, "lm_head.weight", 1.0)
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    for stated in (True, None, False):
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": stated}
        (source / "config.json").write_text(json.dumps(config))
        made = quantize(source, tmp_path / f"untied {stated}", NF4)
        assert torch.equal(tensors_of(made.folder)["lm_head.weight"], head)
        assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
        noted = any(note.startswith("lm_head.weight differs from") for note in made.plan.notes)
        assert noted == (stated is not False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_weights_that_are_not_finite(make_model: MakeModel, tmp_path: Path, name: str, value: float) -> None:
    source = make_model()
    damage(source, name, value)
    with pytest.raises(CheckpointError, match=rf"{name}: holds NaN or infinity \(1 of "):
        quantize(source, tmp_path / "out", NF4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_float16(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(dtype="float32")
    damage(source, "transformer.wpe.weight", 1e5)
    with pytest.raises(CheckpointError, match=r'wpe\.weight: holds 100000, more than float16 can .*dtype = "bfloat16"'):
        quantize(source, tmp_path / "out", NF4)
    quantize(source, tmp_path / "out", Recipe.simple(4, "nf4", dtype="bfloat16"))
    assert tensors_of(tmp_path / "out")["transformer.wpe.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["nf4", "int8", "mixed", "gptq3"])
def test_float64_weights_are_quantized_as_float32(make_model: MakeModel, tmp_path: Path, recipe: str) -> None:
    narrow, wide = make_model("narrow", dtype="float32"), make_model("wide", dtype="float64")
    weights = load_file(wide / "model.safetensors")
    save_file({name: weight.float() for name, weight in weights.items()}, narrow / "model.safetensors")
    shown = Calibration(torch.arange(32).view(2, 16), "made up", "0" * 64, 0) if "gptq" in recipe else None
    made = [
        quantize(source, tmp_path / f"{source.name}-out", Recipe.load(recipe), calibration=shown)
        for source in (narrow, wide)
    ]
    expected, found = (tensors_of(result.folder) for result in made)
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    assert not any("float64" in note for note in made[0].plan.notes)
    assert sum("float64 weights are rounded to float32" in note for note in made[1].plan.notes) == 1
    converted = neoquant.convert(wide, tmp_path / "plain", to="safetensors", dtype="float32").folder
    assert all(torch.equal(t, weights[n].float()) for n, t in tensors_of(converted).items())


def test_quantized_sources_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for number, recipe in enumerate(["nf4", "int8", "mixed"]):
        out = tmp_path / str(number)
        quantize(tiny_model, out, Recipe.load(recipe))
        with pytest.raises(RequestError, match=r"already quantized .*give the model .* neoquant generate"):
            quantize(out, tmp_path / "again", NF4)
        config = json.loads((out / "config.json").read_text())
        del config["quantization_config"]
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(RequestError, match="already quantized"):
            quantization.plan(out, NF4)


def test_a_source_without_a_tokenizer_is_noted(make_model: Callable[..., Path]) -> None:
    source = make_model()
    assert not any("tokenizer" in note for note in quantization.plan(source, NF4).notes)
    (source / "tokenizer.json").unlink()
    assert any("no tokenizer beside these weights" in note for note in quantization.plan(source, NF4).notes)


@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_replaced(tiny_model: Path, force: bool) -> None:
    with pytest.raises(RequestError, match="would be lost: name another folder"):
        quantize(tiny_model, tiny_model / ".." / tiny_model.name, Recipe.simple(), force=force)


def test_an_existing_folder_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "out", NF4)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="exists"):
        quantize("nobody/nothing", tmp_path / "out", NF4)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    quantize(tiny_model, tmp_path / "out", Recipe.simple(8, "int8"), force=True)
    assert (tmp_path / "out" / "config.json").read_bytes() != before[tmp_path / "out" / "config.json"]


def test_a_model_on_the_hub(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned and refused from headers, fetched once at the commit that was planned; the card says whose it is."""
    cached, commit = make_model("cached"), "c" * 40
    sizes = {path.name: path.stat().st_size for path in cached.iterdir()}
    asked, fetched = [], []

    def find(source: str, revision: str | None) -> hub.HubModel:
        asked.append(revision)
        return hub.HubModel(source, commit, cached, sizes)

    def fetch_headers(model: hub.HubModel) -> list[Any]:
        with open_checkpoint(cached) as checkpoint:
            return [(header, "model.safetensors", at) for at, header in enumerate(checkpoint.headers.values())]

    monkeypatch.setattr(hub, "find", find)
    monkeypatch.setattr(hub, "fetch_headers", fetch_headers)
    monkeypatch.setattr(hub, "fetch_files", lambda model, progress: fetched.append(model))
    planned = quantization.plan("someone/tiny", NF4, revision="main")
    with pytest.raises(RequestError, match="matches no layer"):
        quantize("someone/tiny", tmp_path / "out", Recipe.simple(4, "nf4", keep=["*.c_fk"]), revision="main")
    assert not fetched
    result = quantize("someone/tiny", tmp_path / "out", NF4, revision="main")
    assert (len(fetched), asked) == (1, ["main", "main", "main", commit])
    assert planned.output_bytes == pytest.approx(result.output_bytes, rel=0.01)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == "someone/tiny"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert {"neoquant", "nf4", "4-bit", "gpt_neo", "bitsandbytes"} <= set(card.data.tags)
    assert f"revision `{commit}`" in card.text
    assert "neoquant compare someone/tiny out" in card.text
    record = json.loads((tmp_path / "out" / "neoquant.json").read_text())
    assert (record["source"], record["revision"]) == ("someone/tiny", commit)


def test_card_of_neoquants_own_format(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "out", Recipe.load("mixed"))
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.library_name == "neoquant"
    assert {"nf4", "int8", "4-bit", "8-bit"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert "from_pretrained" not in card.text
    assert "| `transformer.h.*.mlp.c_proj` | 2 | int8, nearest | `match = '*.mlp.c_proj'` |" in card.text


def test_disk_space_is_checked_first(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "free_bytes", lambda path: 10_000)
    with pytest.raises(OutputError, match=r"out: [\d.]+ KB needed, 10\.0 KB free"):
        quantize(tiny_model, tmp_path / "out", NF4)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    class Impatient(Progress):
        def task(self, label: str, total: float) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", NF4, progress=Impatient())
    assert not list(tmp_path.iterdir())


def test_the_folder_may_be_moved_and_the_source_deleted(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    quantize(source, tmp_path / "out", NF4)
    shutil.rmtree(source)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with open_checkpoint(tmp_path / "elsewhere") as checkpoint:
        assert checkpoint.read("transformer.wte.weight").shape == (259, 24)


PEAK = """
import sys
from neoquant.quantization import plan, streaming
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe

plan.IN_FLIGHT_BYTES = streaming.IN_FLIGHT_BYTES = 1 << 23  # a queue that these models fill
result = quantize(sys.argv[1], sys.argv[2], Recipe.load("nf4"))
print(result.peak_rss_bytes, result.plan.peak_memory_bytes, result.plan.source_bytes)
"""


def test_memory_does_not_grow_with_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    """Two models with the same largest tensor, one of four times the size: the same peak, and about as planned."""
    peaks, sizes = [], []
    for layers in (2, 12):
        kinds: dict[str, Any] = {"attention_types": [[["global"], layers]], "attention_layers": ["global"] * layers}
        # Tensors of megabytes: of each one, some 25 kB of the mapped source stay resident (pages around a fault).
        kinds |= {"hidden_size": 512, "num_heads": 4, "vocab_size": 2000, "dtype": "float32"}
        source = make_model(str(layers), num_layers=layers, **kinds)
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"out-{layers}")]
        peak, predicted, size = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
        peaks.append(peak)
        sizes.append(size)
        assert peak == pytest.approx(predicted, rel=0.5)  # how much torch alone takes differs from build to build
    assert sizes[1] > 4 * sizes[0]
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 5
