"""The verbs at work on a tiny random model, and what they say when the work cannot be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli

from neoquant.checkpoint import CheckpointWriter

SIMPLE = ("--bits", "4", "--type", "nf4")


@pytest.fixture
def quantized(cli: Cli, tiny_model: Path) -> Path:
    """The tiny model in NF4, made by the command line."""
    assert cli("quantize", tiny_model, *SIMPLE, "--out", "tiny-nf4").code == 0
    return Path("tiny-nf4").resolve()


def test_plan_shows_every_group_and_the_totals(cli: Cli, tiny_model: Path) -> None:
    result = cli("plan", tiny_model, *SIMPLE, "--keep", "*.c_proj", "--json", "plan.json")
    assert result.code == 0
    for expected in ("q_proj", "c_proj", "wte", "biases and norms", "nf4, block size 64", "weights", "bits", "memory"):
        assert expected in result.out
    plan = json.loads(Path("plan.json").read_text())
    assert {row["action"] for row in plan["tensors"]} == {"quantize", "keep", "copy"}
    assert result.err == "wrote plan.json\n"
    assert max(len(line.rstrip()) for line in result.out.splitlines()[1:]) <= 90


def test_quantize_makes_the_folder_it_says(cli: Cli, tiny_model: Path) -> None:
    result = cli("quantize", tiny_model, *SIMPLE)
    assert result.code == 0 and result.out.startswith("tiny-neo-nf4: ")
    names = {path.name for path in Path("tiny-neo-nf4").iterdir()}
    assert names >= {"config.json", "model.safetensors", "neoquant.json", "README.md", "tokenizer.json"}
    assert [path.name for path in Path.cwd().iterdir()] == ["tiny-neo-nf4"]


def test_quantize_without_a_model_takes_the_bundled_one_and_says_so(
    cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neoquant.demo.MODEL", tiny_model)
    result = cli("quantize", *SIMPLE)
    first, *_ = result.err.splitlines()
    assert "neoquant-demo" in first and "neoquant quantize EleutherAI/gpt-neo-1.3B" in first
    assert result.out.startswith("neoquant-demo-nf4: ") and Path("neoquant-demo-nf4").is_dir()
    assert cli("info", "neoquant-demo").code == 0


@pytest.mark.parametrize(("bits", "type"), [(4, "nf4"), (4, "fp4"), (8, "int8")])
def test_every_legal_pair(cli: Cli, tiny_model: Path, bits: int, type: str) -> None:
    for words in (["--bits", bits, "--type", type], ["--type", type]):
        assert cli("quantize", tiny_model, *words, "--force", "--quiet").code == 0
    out = cli("info", f"tiny-neo-{type}").out
    assert f"weights {type}" in out and "transformers" in out


def test_bits_alone_choose_the_usual_type(cli: Cli, tiny_model: Path) -> None:
    assert "recipe int8" in cli("plan", tiny_model, "--bits", "8").out
    assert "recipe nf4" in cli("plan", tiny_model, "--bits", "4").out
    assert "recipe nf4" in cli("plan", tiny_model).out


def test_the_grid_options_reach_the_grid(cli: Cli, tiny_model: Path) -> None:
    assert (
        "nf4, block size 128, no double quant"
        in cli("plan", tiny_model, "--type", "nf4", "--block-size", "128", "--no-double-quant").out
    )
    assert "format neoquant" in cli("plan", tiny_model, "--format", "neoquant").out
    assert "bfloat16" in cli("plan", tiny_model, "--dtype", "bfloat16").out
    assert cli("plan", tiny_model, "--block-size", "100").code == 2
    assert cli("plan", tiny_model, "--type", "int8", "--block-size", "64").code == 2


def test_keep_comes_before_the_rules_of_a_recipe(cli: Cli, tiny_model: Path) -> None:
    Path("mine.toml").write_text('[[rules]]\nmatch = "*"\nbits = 4\ntype = "fp4"\n')
    assert cli("plan", tiny_model, "--recipe", "mine.toml", "--keep", "*.q_proj", "--json", "p.json").code == 0
    rows = {row["name"]: row["action"] for row in json.loads(Path("p.json").read_text())["tensors"]}
    assert rows["transformer.h.0.attn.attention.q_proj.weight"] == "keep"
    assert rows["transformer.h.0.attn.attention.k_proj.weight"] == "quantize"


def test_a_keep_that_matches_nothing_is_an_error(cli: Cli, tiny_model: Path) -> None:
    result = cli("quantize", tiny_model, *SIMPLE, "--keep", "transfomer.*")
    assert result.code == 2 and "--keep 'transfomer.*': matches no layer; the closest are" in result.error


def test_dry_run_writes_nothing(cli: Cli, tiny_model: Path) -> None:
    result = cli("quantize", tiny_model, *SIMPLE, "--dry-run")
    assert result.code == 0 and "tiny-neo-nf4" in result.out
    assert not list(Path.cwd().iterdir())


def test_force_replaces_and_nothing_else_does(cli: Cli, tiny_model: Path, quantized: Path) -> None:
    before = {path.name: path.read_bytes() for path in quantized.iterdir()}
    result = cli("quantize", tiny_model, *SIMPLE, "--out", quantized)
    assert result.code == 1 and "--force" in result.error
    assert cli("quantize", tiny_model, *SIMPLE, "--out", quantized, "--force").code == 0
    assert {path.name: path.read_bytes() for path in quantized.iterdir()} == before


def test_a_quantized_model_is_not_quantized_again(cli: Cli, quantized: Path) -> None:
    assert "already quantized" in cli("quantize", quantized, *SIMPLE).error


def test_quiet_leaves_only_results(cli: Cli, tiny_model: Path) -> None:
    for words in (["--quiet", "quantize", tiny_model], ["quantize", tiny_model, "-q", "--force"]):
        result = cli(*words)
        assert result.code == 0 and not result.err and result.out.count("\n") == 1


def test_generate_streams_prompt_and_continuation(cli: Cli, quantized: Path) -> None:
    words = ("generate", quantized, "--max-new-tokens", "8", "--seed", "3")
    given = cli(*words, "--prompt", "Hello")
    assert given.code == 0 and given.out.startswith("Hello") and given.out.endswith("\n")
    assert given.err.startswith("8 tokens in ") and "--seed 3" in given.err
    assert cli(*words, stdin="Hello\n").out == given.out


def test_generate_greedy_is_repeatable_and_stays_within_the_context(cli: Cli, tiny_model: Path) -> None:
    first, second = (cli("generate", tiny_model, "-p", "ab", "--greedy").out for _ in range(2))
    assert first == second
    result = cli("generate", tiny_model, "-p", "ab", "--max-new-tokens", "31")
    assert result.code == 1 and "context is 32" in result.error


def test_a_static_cache_changes_nothing_on_a_cpu(cli: Cli, tiny_model: Path) -> None:
    plain, static = (cli("generate", tiny_model, "-p", "ab", "--greedy", *more) for more in ((), ("--static-cache",)))
    assert (static.code, static.out) == (0, plain.out)
    refused = cli("generate", tiny_model, "--task", "text-classification", "-p", "ab", "--static-cache")
    assert refused.code == 2 and "leave out --static-cache" in refused.err


def test_generate_needs_a_prompt(cli: Cli, tiny_model: Path) -> None:
    result = cli("generate", tiny_model)
    assert result.code == 2 and "--prompt" in result.error


def test_eval_prints_each_subset_and_writes_json(cli: Cli, quantized: Path, text_file: Path) -> None:
    suite = ("--suite", "demo", "--context", "16", "--data", text_file)
    result = cli("eval", quantized, *suite, "--json", "result.json")
    assert result.code == 0 and "ArXiv" in result.out and "Github" in result.out
    written = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert written["total"]["documents"] == 3
    assert written["model"]["name"] == "tiny-nf4" and written["model"]["recipe"]["name"] == "nf4"
    alone = cli("eval", quantized, "--context", "16", "--data", text_file, "--json", "alone.json")
    assert alone.code == 0
    assert json.loads(Path("alone.json").read_text())["total"] == json.loads(Path("result.json").read_text())["total"]
    only = cli("eval", quantized, *suite, "--subset", "Github", "--documents", "1")
    assert only.code == 0 and "ArXiv" not in only.out


@pytest.mark.parametrize("protocol", ["rolling", "joined", "strided"])
def test_eval_protocols(cli: Cli, tiny_model: Path, text_file: Path, protocol: str) -> None:
    words = ("--suite", "demo", "--context", "16", "--data", text_file, "--protocol", protocol)
    assert cli("eval", tiny_model, *words).code == 0


def test_compare_takes_several(cli: Cli, tiny_model: Path, quantized: Path, text_file: Path) -> None:
    assert cli("quantize", tiny_model, "--type", "int8").code == 0
    suite = ("--suite", "demo", "--context", "16", "--data", text_file)
    result = cli("compare", tiny_model, quantized, "tiny-neo-int8", *suite, "--json", "cost.json")
    assert result.code == 0 and "tiny-nf4" in result.out and "tiny-neo-int8" in result.out
    written = json.loads(Path("cost.json").read_text(encoding="utf-8"))
    nf4, int8 = (candidate["total"]["kl"] for candidate in written["candidates"])
    assert nf4 > int8 > 0


def test_inspect_maps_the_layers(
    cli: Cli, tiny_model: Path, quantized: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("--context", "16", "--data", text_file)
    result = cli("inspect", quantized, "--base", tiny_model, *text, "--sensitivity", "--json", "layers.json")
    assert result.code == 0 and "q_proj" in result.out and "layers with the largest loss" in result.out
    written = json.loads(Path("layers.json").read_text(encoding="utf-8"))
    assert len(written["layers"]) == 12 and written["base"]["name"] == tiny_model.name
    assert cli("inspect", quantized, "--against", tiny_model, *text, "--rows", "0").code == 2
    monkeypatch.setattr("neoquant.demo.MODEL", tiny_model)
    assert "alone" not in cli("inspect", quantized, *text).out  # against the bundled model, without --sensitivity


def test_report_makes_a_page_markdown_and_a_card(cli: Cli, tiny_model: Path, quantized: Path, text_file: Path) -> None:
    text = ("--context", "16", "--data", text_file)
    assert cli("compare", tiny_model, quantized, *text, "--json", "cost.json").code == 0
    assert cli("inspect", quantized, "--against", tiny_model, *text, "--json", "layers.json").code == 0
    before = (quantized / "README.md").read_text("utf-8")
    done = cli("report", "cost.json", "layers.json", "--html", "x.html", "--markdown", "x.md", "--card", quantized)
    assert done.code == 0 and "q_proj" in done.out and "tiny-nf4" in done.out.splitlines()[-1]
    page, card = Path("x.html").read_text("utf-8"), (quantized / "README.md").read_text("utf-8")
    total = json.loads(Path("cost.json").read_text())["candidates"][0]["total"]
    for written in (page, Path("x.md").read_text("utf-8"), card):
        assert f"{100 * total['agreement']:.2f} [{100 * total['agreement_low']:.2f}, " in written
    assert "Not measured yet" in before and "Not measured yet" not in card
    assert card.startswith(before.partition("## Measured")[0])
    assert cli("report", "cost.json", "--card", quantized).code == 0
    assert (quantized / "README.md").read_text("utf-8") == card
    mark, _, report = Path("x.md").read_text("utf-8").partition("\n")
    assert mark == "<!-- neoquant: report -->"
    assert cli("report", "cost.json", "--markdown", "-").out == report
    refused = cli("report", "cost.json", "--card", tiny_model, "--html", "y.html")
    assert refused.code == 2 and "is none of the measured models (tiny-nf4)" in refused.error
    assert not Path("y.html").exists()
    assert "cost.json is not a folder" in cli("report", "cost.json", "--card", "cost.json").error
    assert "layers.json: no comparison" in cli("report", "layers.json").error
    assert "no/such" in cli("report", "cost.json", "--html", "no/such/x.html").error


def test_a_result_file_is_checked_before_the_work(cli: Cli, text_file: Path) -> None:
    result = cli("eval", "no-such-model", "--suite", "demo", "--json", "no/such/folder/x.json")
    assert result.code == 1 and "no/such/folder" in result.error


def test_info_of_this_machine(cli: Cli) -> None:
    out = cli("info", "--env").out
    assert all(word in out for word in ("torch", "cpu", "memory", "nf4 on cpu", "int8 on cpu"))


def test_info_of_a_plain_model(cli: Cli, tiny_model: Path) -> None:
    out = cli("info", tiny_model).out
    assert "16.000 per weight of the linear layers" in out and "not quantized, float16" in out
    parameters = sum((259 * 24, 32 * 24, 2 * (12 * 24 * 24 + 4 * 24 + 24 + 96 + 24), 2 * 24))
    assert f"{parameters:,}" in out


@pytest.mark.parametrize("verb", ["plan", "quantize", "info", "generate", "eval"])
def test_what_is_not_a_model_is_one_line(cli: Cli, verb: str, tmp_path: Path) -> None:
    extra = {"generate": ["-p", "x"], "eval": ["--suite", "demo"]}.get(verb, [])
    result = cli(verb, tmp_path / "nowhere", *extra)
    assert result.code == 1 and "nowhere" in result.error


def test_another_kind_of_model_is_refused(cli: Cli, make_model: Callable[..., Path]) -> None:
    result = cli("quantize", make_model(model_type="gpt2"))
    assert result.code == 1 and "gpt2" in result.error and "gpt_neo" in result.error


def test_a_truncated_file_is_one_line(cli: Cli, make_model: Callable[..., Path]) -> None:
    folder = make_model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for words in (["quantize", folder], ["generate", folder, "-p", "x"], ["info", folder]):
        result = cli(*words)
        assert result.code == 1 and "model.safetensors" in result.error


@pytest.mark.parametrize(
    "words",
    ["quantize {} --bits 4 --type nf4", "convert {} --to neoquant", "convert {} --to onnx", "tune {} --base {}"],
)
@pytest.mark.parametrize("out", ["loop", "~nobody-of-that-name/x"])
def test_a_place_that_is_none_is_one_line(cli: Cli, tiny_model: Path, words: str, out: str) -> None:
    Path("loop").symlink_to("loop")
    words = words.replace("{}", str(tiny_model))
    calibration = ["--calibration", "demo"] if "tune" in words else []
    result = cli(*words.split(), *calibration, "--out", out)
    assert result.code == 1 and out in result.error and "this is a bug" not in result.error
    assert not Path(out).is_dir()


def test_devices_and_types_are_checked(cli: Cli, tiny_model: Path) -> None:
    for words in (["--device", "tpu"], ["--dtype", "int4"]):
        result = cli("generate", tiny_model, "-p", "x", *words)
        assert result.code == 2 and words[1] in result.error


def test_an_interruption_leaves_nothing(cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "put", interrupt)
    result = cli("quantize", tiny_model, *SIMPLE)
    assert result.code == 130 and result.error == "interrupted"
    assert not list(Path.cwd().iterdir())


def test_what_nobody_expected_is_called_a_bug(cli: Cli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a line\nand another")

    monkeypatch.setattr(CheckpointWriter, "put", fail)
    result = cli("quantize", tiny_model, *SIMPLE)
    assert result.code == 1 and result.error.startswith("error: ZeroDivisionError: a line and another (this is a bug")
    assert "Traceback" in cli("quantize", tiny_model, *SIMPLE, "--debug").err
    assert not list(Path.cwd().iterdir())


def test_quantize_with_calibration(cli: Cli, tiny_model: Path, text_file: Path) -> None:
    shown = ("--calibration", text_file, "--rows", "4", "--length", "16")
    assert cli("quantize", tiny_model, "--bits", "3", "--type", "gptq", "--group-size", "16", *shown).code == 0
    record = json.loads(Path("tiny-neo-gptq3-g16/calibration.json").read_text())
    assert record["calibration"]["source"] == text_file.name and len(record["layers"]) == 12
    assert cli("quantize", tiny_model, *SIMPLE, *shown, "--order", "off").code == 0
    told = cli("info", "tiny-neo-nf4-gptq").out
    assert "transformers with bitsandbytes" in told and "worst" in told and "c_proj" in told
    assert "recipe gptq4-g128" in cli("plan", tiny_model, "--type", "gptq").out
    assert "order off" in (Path("tiny-neo-nf4-gptq") / "README.md").read_text()
    options = ("--order", "off", "--scales", "mse", "--damping", "0.05")
    assert cli("plan", tiny_model, *SIMPLE, *options, "--json", "p.json").code == 0
    stated = json.loads(Path("p.json").read_text())["recipe"]["rules"][0]
    assert stated == {
        "match": "*", "bits": 4, "type": "nf4", "quantizer": "gptq", "order": "off", "scales": "mse", "damping": 0.05,
    }  # fmt: skip
    by_loss = ("--objective", "model", "--correction", "0.5", "--json", "q.json")
    assert cli("plan", tiny_model, *SIMPLE, *by_loss).code == 0
    stated = json.loads(Path("q.json").read_text())["recipe"]["rules"][0]
    assert (stated["quantizer"], stated["objective"], stated["correction"]) == ("gptq", "model", 0.5)
    assert "correction 2.0: legal is 0" in cli("plan", tiny_model, *SIMPLE, "--correction", "2").error
    assert cli("plan", tiny_model, *SIMPLE, "--order", "of").error.endswith("legal are static, off, dynamic")
    assert "--recipe decides the grids, so --order" in cli("plan", "--recipe", "nf4", "--order", "off").error
    assert "name their text with --calibration" in cli("quantize", tiny_model, "--type", "gptq", "--out", "x").error
    unknown = cli("quantize", tiny_model, "--type", "gptq", "--calibration", "nowhere", "--out", "x")
    assert "calibration 'nowhere': give a file of text, or one of pile, demo" in unknown.error
    assert cli("quantize", tiny_model, "--type", "int8", "--recipe", "nf4", *shown, "--out", "x").code == 2
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("words", "name", "stated"),
    [
        ("--quantizer nearest", "nf4", {"bits": 4, "type": "nf4", "quantizer": "nearest"}),
        ("--quantizer gptq", "nf4-gptq", {"bits": 4, "type": "nf4", "quantizer": "gptq"}),
        ("--bits 3 --quantizer gptq", "gptq3-g128", {"bits": 3, "type": "affine", "quantizer": "gptq"}),
        ("--type gptq --quantizer gptq", "gptq4-g128", {"bits": 4, "type": "affine", "quantizer": "gptq"}),
        (
            "--quantizer-option damping=0.5 --quantizer-option order=off --type affine",
            "gptq4-g128",
            {"bits": 4, "type": "affine", "quantizer": "gptq", "damping": 0.5, "order": "off"},
        ),
    ],
)
def test_quantizers_by_name(cli: Cli, tiny_model: Path, words: str, name: str, stated: dict[str, object]) -> None:
    assert cli("plan", tiny_model, *words.split(), "--json", "p.json").code == 0
    recipe = json.loads(Path("p.json").read_text())["recipe"]
    assert recipe["name"] == name and recipe["rules"] == [{"match": "*", **stated}]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--quantizer gptk", "quantizer 'gptk' is not one of"),
        ("--type nearest --quantizer gptq", "--type nearest is the affine grid and --quantizer nearest, not"),
        ("--quantizer nearest --order off", "quantizer 'nearest' has no option order"),
        ("--quantizer-option speed=1", "no quantizer has the option speed"),
        ("--quantizer gptq --quantizer-option damping", "--quantizer-option 'damping' is not NAME=VALUE"),
        ("--quantizer gptq --quantizer-option damping=much", "damping is a number (its default is 0.01), got 'much'"),
        ("--order off --quantizer-option order=static", "--order and --quantizer-option order are the same"),
        ("--recipe nf4 --quantizer gptq --quantizer-option a=b", "so --quantizer, --quantizer-option cannot be given"),
    ],
)
def test_quantizers_are_refused(cli: Cli, tiny_model: Path, words: str, error: str) -> None:
    assert error in cli("plan", tiny_model, *words.split()).error
