"""Hostile inputs one by one: each is refused with a line that says why, before anything is lost."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Cli, write_tiny_model
from safetensors.torch import load_file, save_file

from neoquant.data import documents
from neoquant.errors import CheckpointError
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe
from neoquant.tokenizer.bounds import check_growth

if TYPE_CHECKING:
    from hub_stand_in import StandIn

GENERATE = ("--prompt", "x", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with its card."""
    folder = tmp_path_factory.mktemp("hostile")
    return quantize(write_tiny_model(folder / "source"), folder / "nf4", Recipe.simple()).folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": "yes"}, "quantization_config"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "quant_method"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon is 'tiny'; legal is a finite number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": "1e-05"}, "layer_norm_epsilon is '1e-05'"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": 1e20}, "eos_token_id is 1e+20"),
        ({"hidden_size": 1e12}, "hidden_size is 1000000000000.0"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        (
            {"num_layers": 10**9, "attention_types": [[["global", "local"], 5 * 10**8]], "attention_layers": None},
            "layers",
        ),
        ({"num_layers": 4, "attention_types": [[["global"], 4]], "attention_layers": None}, "num_layers"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "plan"])
def test_configs(cli: Cli, make_model: Callable[..., Path], changes: dict[str, Any], says: str, verb: str) -> None:
    folder = make_model()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    result = cli(verb, folder, *(GENERATE if verb == "generate" else ()))
    assert result.code in (1, 2) and says in result.error


def test_a_tokenizer_of_more_tokens_than_the_model(cli: Cli, make_model: Callable[..., Path]) -> None:
    assert "the model knows 60 tokens" in cli("generate", make_model(vocab_size=60), *GENERATE).error


def test_weights_that_are_not_finite(cli: Cli, make_model: Callable[..., Path]) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for options in ((), ("--greedy",), ("--temperature", "1e-300"), ("--temperature", "0")):
        result = cli("generate", folder, *GENERATE, *options)
        assert result.code == 1 and "finite" in result.err.splitlines()[-1]
        turn = cli("chat", folder, *options[:0] if options == ("--greedy",) else options, stdin="x\n")
        assert turn.code == 1 and "finite" in turn.err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_temperatures_next_to_zero_take_the_likeliest(cli: Cli, tiny_model: Path, verb: str) -> None:
    """What is divided by them overflows; the likeliest token is what is left."""
    words = (verb, tiny_model, "--max-new-tokens", "5", "--seed", "1")
    expected = cli(*words, "--temperature", "0", stdin="word\n")
    for temperature in ("1e-300", "1e-40", "5e-324"):
        found = cli(*words, "--temperature", temperature, stdin="word\n")
        assert found.code == 0 and found.out == expected.out
    for temperature in ("-1", "nan", "-inf", "inf", "x"):
        refused = cli(*words, f"--temperature={temperature}", stdin="word\n")
        assert refused.code == 2 and "temperature" in refused.error


@pytest.mark.parametrize(
    "words", [("generate",), ("chat",), ("quantize", "--type", "gptq", "--calibration", "demo")], ids=lambda w: w[0]
)
def test_seeds(cli: Cli, tiny_model: Path, words: tuple[str, ...]) -> None:
    for seed in (2**70, 2**63, -1, "x"):
        refused = cli(words[0], tiny_model, *words[1:], "--seed", seed, stdin="x\n")
        assert refused.code == 2 and "--seed" in refused.error and str(seed) in refused.error
    if words[0] != "quantize":
        assert cli(words[0], tiny_model, "--seed", 2**63 - 1, "--max-new-tokens", 2, stdin="x\nx\n").code == 0


def test_a_prompt_that_is_no_text(cli: Cli, tiny_model: Path) -> None:
    assert "standard input is not UTF-8: byte 2 is 0xff" in cli("generate", tiny_model, stdin="a\udcff").error
    turns = cli("chat", tiny_model, "--max-new-tokens", "2", stdin="a\udcff\nx\n/show\n")
    assert turns.code == 0 and "a line that is not UTF-8 is left out" in turns.err and "x" in turns.out


def test_a_task_that_is_none_comes_first(cli: Cli) -> None:
    assert "task is 'translate'; legal are" in cli("generate", "--task", "translate", "--seed", "1", stdin="x").error


def test_empty_extra_tensors_take_no_time(cli: Cli, make_model: Callable[..., Path]) -> None:
    """Twenty thousand of them: what takes their square takes minutes."""
    folder = make_model()
    tensors = load_file(folder / "model.safetensors") | {f"extra.{n}": torch.empty(0) for n in range(20_000)}
    save_file(tensors, folder / "model.safetensors")
    assert cli("info", folder).code == 0
    made = cli("quantize", folder, "--out", "out")
    assert made.code == 0 or "extra" in made.error


def test_a_pickle_that_grows(cli: Cli, make_model: Callable[..., Path]) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 200_000_000)
    assert "its pickle has 200,000,000 bytes" in cli("info", folder).error


def test_a_normalizer_that_multiplies() -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    check_growth({"normalizer": {"type": "Sequence", "normalizers": [step]}})
    for growing in ([step] * 2, [{"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 100}]):
        with pytest.raises(CheckpointError, match=r"its normalizer may make a text \d+ times longer"):
            check_growth({"normalizer": {"type": "Sequence", "normalizers": growing}})


def test_shapes_beyond_every_memory(cli: Cli, make_model: Callable[..., Path]) -> None:
    """Refused by what the header says, also where nothing is stored of them; sizes are told in words people use."""
    folder = make_model()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for shape in ([0, 10**30], [10**30], [2**62, 2**62]):
        said = json.dumps(header | {"extra": {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]}}).encode()
        path.write_bytes(len(said).to_bytes(8, "little") + said + whole[8 + length :])
        for verb in ("quantize", "plan", "info", "generate"):
            assert "tensor 'extra' " in cli(verb, folder, *(GENERATE if verb == "generate" else ())).error


def test_layers_that_no_tensor_is_of(cli: Cli, make_model: Callable[..., Path]) -> None:
    kinds = {"num_layers": 10**9, "attention_types": [[["global"], 10**9]], "attention_layers": None}
    folder = make_model()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | kinds))
    for verb in ("info", "plan", "quantize", "generate", "eval"):
        words = GENERATE if verb == "generate" else ("--suite", "demo") if verb == "eval" else ()
        assert "num_layers is 1000000000; legal is an integer of 1 to 100,000" in cli(verb, folder, *words).error


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        (5, "weight_map gives 5 for 'transformer.wte.weight'"),
        (None, "weight_map gives None for 'transformer.wte.weight'"),
        (["a"], r"weight_map gives ['a'] for 'transformer.wte.weight'"),
        ({"a": 1}, "weight_map gives {'a': 1} for 'transformer.wte.weight'"),
        ("../../x", "weight_map gives '../../x' for 'transformer.wte.weight'"),
        ("/etc/passwd", "weight_map gives '/etc/passwd' for"),
        ("\x1b[31mred", "\\x1b[31mred, which is missing"),
    ],
)
def test_index_entries(cli: Cli, make_model: Callable[..., Path], shard: Any, says: str) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for verb in ("info", "quantize"):
        refused = cli(verb, folder)
        assert refused.code == 1 and says in refused.error and "\x1b" not in refused.error


def test_recipes(cli: Cli, tiny_model: Path) -> None:
    for content, says in (
        (b"a = " + b"[" * 100_000, "is not TOML"),
        (b"a = " + b"{b = " * 10_000, "is not TOML"),
        (b'name = "../../x"\n', "../../x"),
        (b'name = "\x1b[31mred"\n', "is not TOML"),
        (b'name = "\\u001b[31mred"\n', "\\x1b[31mred"),
    ):
        Path("recipe.toml").write_bytes(content)
        for verb in ("plan", "quantize"):
            refused = cli(verb, tiny_model, "--recipe", "recipe.toml")
            assert says in refused.error and "recipe.toml" in refused.error and "\x1b" not in refused.error
    for verb in ("plan", "quantize"):
        assert "/dev/zero: is a device or a pipe" in cli(verb, tiny_model, "--recipe", "/dev/zero").error
    assert [path.name for path in Path.cwd().iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    "answer", [b"<html><body>Log in to the network</body></html>", b"", b"{}", b"[]", b'"x"', b"1"]
)
def test_a_network_that_answers_for_the_hub(bare_hub: StandIn, cli: Cli, made: Path, answer: bytes) -> None:
    """A captive portal gives its login page to whatever is asked for, with status 200."""
    bare_hub.portal = answer
    for words in (
        ("info", "user/neo"), ("plan", "user/neo"), ("quantize", "user/neo"), ("push", made, "user/other"),
        ("generate", "user/neo", *GENERATE),
    ):  # fmt: skip
        refused = cli(*words)
        assert refused.code == 1 and "user/" in refused.error
        if answer.startswith(b"<"):
            assert f"what answers at {bare_hub.url} is not the hub" in refused.error
    assert not list(Path.cwd().iterdir())


# data -----------------------------------------------------------------------------------------------------------------

ROW = b'{"text": "some words"}\n'


def evaluated(cli: Cli, tiny_model: Path, name: str, content: bytes) -> Any:
    Path(name).write_bytes(content)
    return cli("eval", tiny_model, "--data", name, "--context", "16", "--json", "-")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "line 1: not JSON: it is nested too deeply"),
        ('{"text": "a"}'.encode("utf-16"), "error: x.jsonl is UTF-16: convert it to UTF-8"),
        (b'{"text": 5}', 'line 1: "text" is 5; expected a string'),
        (b'{"text": "a", "meta": {"pile_set_name": ["x"]}}', """line 1: "pile_set_name" is ['x']; expected a string"""),
        (b'{"text": "' + b"x" * 3000 + b'"}', "line 1 has more than 1,000 bytes; set NEOQUANT_MAX_TEXT_SIZE"),
    ],
)
def test_lines(cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str) -> None:
    if "more than" in says:
        monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 1000)
    assert says in evaluated(cli, tiny_model, "x.jsonl", content).error


def test_documents_without_a_last_word_are_named_with_their_file(cli: Cli, tiny_model: Path) -> None:
    Path("x.jsonl").write_text('{"text": "two words"}\n{"text": "one"}\n')
    found = cli("eval", tiny_model, "--data", "x.jsonl", "--context", "16", "--protocol", "last-word")
    assert found.error == "error: x.jsonl: line 2: no last word after a space to predict"


def test_a_context_of_one_position(cli: Cli, make_model: Callable[..., Path], text_file: Path) -> None:
    model = make_model(max_position_embeddings=1)
    found = cli("eval", model, "--data", text_file)
    assert "the model has 1 position, and text is scored in windows of 2 tokens or more" in found.error
    found = cli("generate", model, "--prompt", "a", "--max-new-tokens", "2")
    assert "1 token of prompt and 2 new make 3; this model's context is 1: ask for at most 0 new tokens" in found.error


def test_zstandard_of_a_line_of_zeros_is_refused_in_bounded_memory(cli: Cli, tiny_model: Path) -> None:
    import zstandard

    from neoquant.sizes import peak_rss_bytes

    frame = zstandard.compress(b"\0" * 100_000_000)
    before = peak_rss_bytes()
    assert "line 1 has more than 32,000,000 bytes" in evaluated(cli, tiny_model, "x.jsonl.zst", frame * 100).error
    assert peak_rss_bytes() - before < 400_000_000


def test_zstandard_cut_at_a_block_is_refused(cli: Cli, tiny_model: Path) -> None:
    import zstandard

    writer = zstandard.ZstdCompressor().compressobj()
    first = writer.compress(ROW * 9) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert "ends in the middle of a frame" in evaluated(cli, tiny_model, "x.jsonl.zst", first).error
    whole = first + writer.compress(ROW * 9) + writer.flush()
    assert json.loads(evaluated(cli, tiny_model, "x.jsonl.zst", whole).out)["total"]["documents"] == 18
    assert json.loads(evaluated(cli, tiny_model, "x.jsonl.zst", whole * 2).out)["total"]["documents"] == 36


def test_zstandard_with_a_long_window_and_marks_of_byte_order_are_read(cli: Cli, tiny_model: Path) -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    long = compressor.compress(ROW) + compressor.flush()
    plain = evaluated(cli, tiny_model, "x.jsonl", ROW)
    expected = json.loads(plain.out)["data"]["sha256"]
    for name, content in (("x.jsonl.zst", long), ("x.jsonl", b"\xef\xbb\xbf" + ROW)):
        assert json.loads(evaluated(cli, tiny_model, name, content).out)["data"]["sha256"] == expected
    texts = [json.loads(evaluated(cli, tiny_model, "x.txt", mark + b"words").out) for mark in (b"", b"\xef\xbb\xbf")]
    assert texts[0]["total"]["bytes"] == texts[1]["total"]["bytes"] == 5


# outputs --------------------------------------------------------------------------------------------------------------


def test_an_output_that_is_an_input_is_refused(cli: Cli, make_model: Callable[..., Path], text_file: Path) -> None:
    folder = make_model()
    before = {path: path.read_bytes() for path in (text_file, folder / "config.json")}
    for path in before:
        refused = cli("eval", folder, "--data", text_file, "--context", "16", "--json", path, "--force")
        assert refused.code == 1 and "is read as input, and would be lost" in refused.error
    Path("link.json").symlink_to(text_file)
    assert cli("eval", folder, "--data", text_file, "--context", "16", "--json", "link.json").code == 1
    assert before == {path: path.read_bytes() for path in before}


def test_results_and_models_are_no_outputs(cli: Cli, made: Path, text_file: Path) -> None:
    words = ("compare", made, made, "--data", text_file, "--context", "16", "--documents", "1")
    assert cli(*words, "--json", "t.json").code == 0
    before = {path: path.read_bytes() for path in (Path("t.json"), *made.iterdir())}
    for option in ("--html", "--markdown"):
        assert "t.json is read as input, and would be lost" in cli("report", "t.json", option, "t.json").error
        assert "config.json" in cli("report", "t.json", option, made / "config.json").error
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert cli(*words, "--json", made / name, "--force").code == 1
    assert before == {path: path.read_bytes() for path in before}


def test_results_are_nested_within_reason(cli: Cli) -> None:
    Path("deep.json").write_text("[" * 100_000)
    assert "deep.json is not a result of neoquant: no JSON object" in cli("report", "deep.json").error
    refused = cli("compare", "deep.json", "deep.json")
    assert "deep.json: cannot be read as a result: it is nested too deeply" in refused.error


def test_another_file_needs_force(cli: Cli, tiny_model: Path, text_file: Path) -> None:
    words = ("eval", tiny_model, "--data", text_file, "--context", "16", "--json", "x.json")
    Path("x.json").write_text('{"mine": 1}')
    assert "x.json exists and is not a saved evaluation; choose another name" in cli(*words).error
    assert Path("x.json").read_text() == '{"mine": 1}'
    assert cli(*words, "--force").code == 0
    assert cli(*words).code == 0, "such a result is replaced"
    compared = ("compare", "x.json", "x.json", "--json", "x.json", "--force")
    assert "is read as input" in cli(*compared).error


def test_conditions_are_checked_before_any_model_is_opened(cli: Cli, text_file: Path) -> None:
    for condition, says in (("kl > 1", "kl needs a comparison"), ("perplexity > nan", "write it like")):
        assert says in cli("eval", "nowhere", "--data", text_file, "--fail-if", condition).error
    assert "device is 'toaster'" in cli("eval", "nowhere", "--data", text_file, "--device", "toaster").error


def test_names_do_not_control_the_terminal(cli: Cli, make_model: Callable[..., Path]) -> None:
    folder = make_model()
    name = "\x1b[31mred\x1b[0m\u202e"
    save_file(load_file(folder / "model.safetensors") | {name: torch.ones(2, 2)}, folder / "model.safetensors")
    for verb in ("plan", "info", "generate"):
        result = cli(verb, folder, *(GENERATE if verb == "generate" else ()))
        assert "\x1b" not in result.out + result.err and "\u202e" not in result.out + result.err


def test_names_that_are_no_utf8(cli: Cli, make_model: Callable[..., Path]) -> None:
    """A folder of any name is read and made, and what is written about it is UTF-8."""
    model, made = os.fsdecode(b"m\xffodel"), os.fsdecode(b"ma\xffde")
    make_model().rename(model)
    data = Path(os.fsdecode(b"da\xffta.jsonl"))
    data.write_text('{"text": "some words"}\n{"text": "word", "meta": {"pile_set_name": "\\ud800"}}\n')
    words = ("--data", data, "--context", "16")
    for command in (
        ("quantize", model, "--out", made),
        ("convert", made, "--to", "neoquant", "--out", f"{made}-own"),
        ("plan", model, "--json", "plan.json"),
        ("eval", made, *words, "--json", "eval.json"),
        ("compare", model, made, *words, "--json", "compare.json"),
        ("report", "compare.json", "--html", "page.html", "--markdown", "page.md"),
        ("inspect", made, "--against", model, *words, "--json", "layers.json"),
        ("generate", made, *GENERATE),
    ):
        result = cli(*command)
        assert result.code == 0, result
        (result.out + result.err).encode()
    for file in (*Path.cwd().glob("*.[jhm]*"), *Path(made).glob("*.[jm]*")):
        if file != data and file.is_file() and file.suffix != ".safetensors":
            assert file.read_text("utf-8")
    assert json.loads(Path("eval.json").read_text())["model"]["name"] == "ma\\udcffde"


def test_what_is_no_file_of_text_is_named(cli: Cli, tiny_model: Path) -> None:
    os.mkfifo("x.jsonl")
    for path in ("x.jsonl", "/dev/null"):
        assert f"{path}: is a device or a pipe" in cli("eval", tiny_model, "--data", path, "--context", "16").error


def test_subsets_do_not_control_the_terminal(cli: Cli, tiny_model: Path) -> None:
    row = {"text": "some words", "meta": {"pile_set_name": "\x1b]0;title\x07\u202ered"}}
    Path("x.jsonl").write_text(json.dumps(row))
    words = ("--data", "x.jsonl", "--context", "16")
    for found in (cli("eval", tiny_model, *words), cli("compare", tiny_model, tiny_model, *words)):
        assert found.code == 0 and "\\x1b]0;" in found.out
        assert not {"\x1b", "\x07", "\u202e"} & set(found.out + found.err)
    missing = cli("eval", tiny_model, *words, "--subset", "\x1b[31mred")
    assert missing.code != 0 and "\x1b" not in missing.err
