"""Converting: the same codes in every format that holds them, plain weights that transformers reads, clear refusals."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, tiny_shapes, write_tiny_model
from safetensors.torch import load_file, save_file

import neoquant
from neoquant.errors import CheckpointError, OutputError, RequestError
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.quantization.convert import TARGETS, convert
from neoquant.quantization.model_card import with_measured
from neoquant.quantization.recipe import Recipe
from neoquant.tensor import QuantizedTensor

WIDE = {"hidden_size": 64, "num_heads": 4}
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nf4": ({"bits": 4, "type": "nf4"}, ("bnb4", "packed")),
    "fp4, single": ({"bits": 4, "type": "fp4", "double_quant": False, "block_size": 32}, ("bnb4", "packed")),
    "int8": ({"bits": 8, "type": "int8"}, ("bnb8", "packed")),
    "affine, symmetric": (
        {"bits": 4, "type": "affine", "group_size": 32, "symmetric": True},
        ("gptq", "gptq-v1", "gptq-v2", "compressed-tensors", "packed"),
    ),
    "affine": (
        {"bits": 4, "type": "affine", "group_size": 32, "keep": ["*.mlp.c_proj"]},
        ("gptq", "gptq-v2", "compressed-tensors", "packed"),
    ),
    "affine, ragged": ({"bits": 3, "type": "affine", "group_size": 128}, ("gptq", "gptq-v2", "packed")),
    "affine, rows": (
        {"bits": 8, "type": "affine", "group_size": -1},
        ("gptq", "gptq-v2", "compressed-tensors", "packed"),
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain") / "source", **WIDE)


def weights(folder: Path) -> dict[str, QuantizedTensor | torch.Tensor]:
    """Every parameter of a folder's model, quantized ones as they are stored."""
    model = neoquant.GPTNeoForCausalLM.from_pretrained(folder, dtype="auto")
    found: dict[str, QuantizedTensor | torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module.quantized
    return found


def assert_same(first: Path, second: Path) -> None:
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        other = after[name]
        if isinstance(tensor, QuantizedTensor):
            assert isinstance(other, QuantizedTensor) and tensor.equals(other), name
        else:
            assert isinstance(other, torch.Tensor) and torch.equal(tensor, other), name


@pytest.mark.parametrize(("options", "targets"), RECIPES.values(), ids=RECIPES)
def test_there_and_back_is_the_same(
    source: Path, tmp_path: Path, options: dict[str, Any], targets: tuple[str, ...]
) -> None:
    """From the format that quantizing chose to each other, and from there to all others again."""
    first = neoquant.quantize(source, tmp_path / "first", Recipe.simple(**options)).folder
    for target in targets:
        made = convert(first, tmp_path / target, target)
        assert made.after == target and len(made.layers) in (8, 10, 12)
        assert_same(first, made.folder)
        record = json.loads((made.folder / "neoquant.json").read_text())
        assert record["converted_from"]["format"] == made.before and record["recipe"]["name"]
    back = convert(
        tmp_path / targets[-1], tmp_path / "back", json.loads((first / "neoquant.json").read_text())["format"]
    )
    assert (back.folder / "config.json").read_bytes() == (first / "config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (first, back.folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("options", "targets"), RECIPES.values(), ids=RECIPES)
def test_every_other_target_is_refused_with_what_is_legal(
    source: Path, tmp_path: Path, options: dict[str, Any], targets: tuple[str, ...]
) -> None:
    first = neoquant.quantize(source, tmp_path / "first", Recipe.simple(**options)).folder
    families = {"packed": "neoquant", "bnb4": "bitsandbytes", "bnb8": "bitsandbytes"}
    legal = {*targets, "safetensors", *(families.get(target, target) for target in targets)}
    if "gptq" in legal:
        legal |= {"gptq-v1"}  # depends on the values
    for target in TARGETS.keys() - legal:
        with pytest.raises(RequestError, match=r"transformer\.h\.0.*--dequantize gives plain weights") as caught:
            convert(first, tmp_path / "out", target)
        assert all(name in str(caught.value) for name in ("neoquant can", str(first))), caught.value
        assert not list(tmp_path.glob("*out*"))


def test_an_activation_order_travels(source: Path, tmp_path: Path) -> None:
    """GPTQ's g_idx and our own order say the same; compressed-tensors has no place for it."""
    made = neoquant.quantize(source, tmp_path / "first", Recipe.simple(4, "affine", group_size=32, format="neoquant"))
    path = made.folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(".weight.neoquant")]:
        columns = 256 if "c_proj" in name else 64
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).view(-1, 32).sort(1).values
        tensors[name.replace(".neoquant", ".order")] = order.flatten().int()
    tables = [name for name in tensors if name.startswith("transformer.wte")]
    with pytest.raises(
        RequestError, match=r"transformer.wte: format gptq keeps embeddings in half precision.*--to neoquant"
    ):
        convert(made.folder, tmp_path / "no", "gptq")
    plain = load_file(source / "model.safetensors")["transformer.wte.weight"]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in tables}
    save_file(tensors | {"transformer.wte.weight": plain}, path)
    for target in ("gptq", "packed"):
        assert_same(made.folder, convert(made.folder, tmp_path / target, target).folder)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert_same(made.folder, convert(tmp_path / "gptq", tmp_path / "back", "neoquant").folder)
    with pytest.raises(RequestError, match="cannot hold an activation order: --to gptq or neoquant can"):
        convert(made.folder, tmp_path / "no", "compressed-tensors")


def test_version_1_holds_every_zero_but_zero(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    folder = write_tiny_model(tmp_path / "positive", **WIDE)
    name = "transformer.h.1.attn.attention.k_proj.weight"
    save_file(tensors | {name: tensors[name].abs()}, folder / "model.safetensors", metadata={"format": "pt"})
    made = neoquant.quantize(folder, tmp_path / "v2", Recipe.simple(4, "affine", group_size=32))
    with pytest.raises(RequestError, match=r"k_proj: a zero of 0 would be stored as -1 in v1 .*--to gptq-v2") as caught:
        convert(made.folder, tmp_path / "v1", "gptq-v1")
    assert "compressed-tensors" in str(caught.value)
    symmetric = neoquant.quantize(folder, tmp_path / "s", Recipe.simple(4, "affine", group_size=32, symmetric=True))
    for version in ("gptq-v2", "gptq-v1"):
        out = convert(symmetric.folder, tmp_path / version, version).folder
        said = json.loads((out / "config.json").read_text())["quantization_config"]
        assert said["checkpoint_format"] == {"gptq-v1": "gptq", "gptq-v2": "gptq_v2"}[version]


def test_what_a_family_stands_for_follows_from_the_weights(source: Path, tmp_path: Path) -> None:
    for kind, format in (("nf4", "bnb4"), ("int8", "bnb8")):
        made = neoquant.quantize(
            source,
            tmp_path / kind,
            Recipe.simple({"nf4": 4, "int8": 8}[kind], kind, format="neoquant", embeddings="keep"),
        )
        assert convert(made.folder, tmp_path / f"{kind}-b", "bitsandbytes").after == format


@pytest.mark.parametrize("recipe", ["nf4", "int8", "affine", "own"])
@pytest.mark.parametrize("dtype", [None, "float16", "float32", "bfloat16"])
def test_dequantized_is_a_plain_checkpoint(source: Path, tmp_path: Path, recipe: str, dtype: str | None) -> None:
    """The weights that the quantized model computes with, in the type that was asked for; transformers loads them."""
    transformers = pytest.importorskip("transformers")
    options = RECIPES[recipe][0] if recipe in RECIPES else {"bits": 4, "type": "nf4", "format": "neoquant"}
    first = neoquant.quantize(source, tmp_path / "first", Recipe.simple(**options)).folder
    made = convert(first, tmp_path / "plain", dequantize=True, dtype=dtype)
    config = json.loads((made.folder / "config.json").read_text())
    kind = getattr(torch, dtype or "float16")
    assert config["dtype"] == (dtype or "float16") and "quantization_config" not in config
    tensors = load_file(made.folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tiny_shapes(config)
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    for name, module in neoquant.GPTNeoForCausalLM.from_pretrained(first, dtype="auto").named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            q = module.table.quantized if isinstance(module, QuantEmbedding) else module.quantized
            stored = "transformer.wte.weight" if name == "lm_head" or name.endswith(".table") else f"{name}.weight"
            assert torch.equal(tensors[stored], q.dequantize(kind)), name
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours, _ = neoquant.load(made.folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (ours(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_dequantized_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "large", dtype="bfloat16", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = neoquant.quantize(folder, tmp_path / "nf4", Recipe.simple(type="nf4", double_quant=False))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.mlp\.c_fc: holds 1.*e\+30, more than float16 can"):
        convert(made.folder, tmp_path / "out", dequantize=True, dtype="float16")
    assert convert(made.folder, tmp_path / "out", dequantize=True).after == "safetensors"


def old_bin(source: Path, folder: Path) -> Path:
    """The same model as it was saved years ago: a pickle in float32, with masks and the head beside its embedding."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    for block in range(2):
        tensors[f"transformer.h.{block}.attn.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
        tensors[f"transformer.h.{block}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_old_pickle_becomes_safetensors(source: Path, tmp_path: Path, dtype: str | None) -> None:
    old = old_bin(source, tmp_path / "old")
    made = convert(old, tmp_path / "new", "safetensors", dtype=dtype)
    expected = load_file(source / "model.safetensors")
    found = load_file(made.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    kind = torch.float16 if dtype else torch.float32
    assert all(found[name].dtype == kind and torch.equal(found[name], t.to(kind)) for name, t in expected.items())
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == (dtype or "float32")
    assert any("lm_head.weight is not written" in note for note in made.notes)
    assert any("4 old mask buffers" in note for note in made.notes)
    assert (made.folder / "tokenizer.json").is_file() and not list(made.folder.glob("*.bin"))


def test_a_pickle_that_holds_code_is_not_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "ran",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Evil()}))
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "out", "safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_head_that_is_not_the_embedding_is_kept(source: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tied", **WIDE)
    tensors = load_file(source / "model.safetensors")
    other = tensors["transformer.wte.weight"] + 1
    save_file(tensors | {"lm_head.weight": other}, folder / "model.safetensors", metadata={"format": "pt"})
    made = convert(folder, tmp_path / "out", "safetensors")
    assert torch.equal(load_file(made.folder / "model.safetensors")["lm_head.weight"], other)
    assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert any(note.startswith("lm_head.weight differs from transformer.wte.weight") for note in made.notes)


def test_shards_and_the_types_that_a_format_forgets(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "float32", dtype="float32", **WIDE)
    first = neoquant.quantize(source, tmp_path / "own", Recipe.simple(8, "int8", format="neoquant", embeddings="keep"))
    made = convert(first.folder, tmp_path / "out", "bnb8", shard_size=20_000)
    assert len(list(made.folder.glob("model-*.safetensors"))) > 2
    assert "bnb8 does not say what type weights had before: float32 is now float16" in made.notes
    assert not convert(first.folder, tmp_path / "again", "packed").notes


def test_what_was_measured_and_calibrated_travels(source: Path, tmp_path: Path) -> None:
    """They were measured on these very weights; plain ones are rounded, and others."""
    first = neoquant.quantize(source, tmp_path / "first", Recipe.simple(type="nf4")).folder
    card = first / "README.md"
    for measured in (False, True):
        if measured:
            card.write_text(with_measured(card.read_text(), "perplexity 12.5"))
            (first / "calibration.json").write_text('{"documents": ["abc"]}')
        exact = convert(first, tmp_path / f"exact-{measured}", "packed").folder
        plain = convert(first, tmp_path / f"plain-{measured}", dequantize=True).folder
        assert ("perplexity 12.5" in (exact / "README.md").read_text()) == measured
        assert (exact / "calibration.json").is_file() == measured
        assert "perplexity" not in (plain / "README.md").read_text() and not (plain / "calibration.json").exists()
    for folder, library in ((exact, "neoquant"), (plain, "transformers")):
        text = (folder / "README.md").read_text()
        assert text.startswith("---\n") and f"library_name: {library}" in text and "from `bnb4` to" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing is asked for: --to names a format (bitsandbytes, gptq, compressed-tensors, neoquant, bnb4"),
        (["--to", "gguf"], 2, "no format is called 'gguf'; there are bitsandbytes, gptq"),
        (["--to", "safetensors"], 2, "is quantized (format bnb4); --dequantize gives up the packing"),
        (["--to", "packed", "--dequantize"], 2, "gives plain weights, which packed does not hold"),
        (["--to", "packed", "--dtype", "float16"], 2, "dtype is for plain weights"),
        (["--dequantize", "--dtype", "int8"], 2, "dtype is 'int8'; legal are auto, float32"),
        (["--to", "gptq"], 2, "the GPTQ format holds affine grids, not nf4: --to bitsandbytes or neoquant can"),
        (["--dequantize", "--out", "here"], 1, "here exists; choose another name, or replace it with --force"),
        (["--dequantize", "--out", "source"], 2, "source is the model to read, and would be lost"),
    ],
)
def test_refusals_on_the_command_line(cli: Cli, source: Path, words: list[str], code: int, message: str) -> None:
    assert cli("quantize", source, "--type", "nf4", "--out", "source").code == 0
    Path("here").mkdir()
    Path("here/config.json").write_text('{"model_type": "gpt_neo"}')
    result = cli("convert", "source", *words)
    assert result.code == code and message in result.error
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["here", "source"]


def test_the_command_line(cli: Cli, source: Path) -> None:
    plain = cli("convert", source, "--to", "bnb4")
    assert plain.code == 2 and "is not quantized: `neoquant quantize`" in plain.error
    assert "is not quantized; --to safetensors" in cli("convert", source, "--dequantize").error
    assert cli("quantize", source, "--type", "affine", "--group-size", "32", "--out", "first").code == 0
    result = cli("convert", "first", "--to", "compressed-tensors", "--json", "made.json")
    assert result.code == 0 and "first-compressed-tensors: gptq -> compressed-tensors, 12 quantized" in result.out
    made = json.loads(Path("made.json").read_text())
    assert made["before"] == "gptq" and {row["action"] for row in made["tensors"]} == {"convert", "copy"}
    assert "converted from first, format gptq" in cli("info", "first-compressed-tensors").out
    again = cli("convert", "first", "--to", "neoquant", "--out", "first-compressed-tensors")
    assert again.code == 1 and "--force" in again.error
    assert cli("convert", "first", "--to", "neoquant", "--out", "first-compressed-tensors", "--force").code == 0
    assert "format      neoquant\n" in cli("info", "first-compressed-tensors").out


def test_interrupted_it_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = neoquant.quantize(source, tmp_path / "first", Recipe.simple(type="nf4")).folder
    puts = itertools.count()

    def interrupt(*_: Any) -> None:
        if next(puts) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr("neoquant.checkpoint.writer.CheckpointWriter.put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(first, tmp_path / "out", "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    monkeypatch.undo()
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        convert(first, occupied, "packed")
