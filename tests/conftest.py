"""What every test may ask for: tiny random models, the command line, real data where it is."""

from __future__ import annotations

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
import pytest

# No test is timed: a busy machine would fail it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if TYPE_CHECKING:
    from hub_stand_in import StandIn

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_RUN = pytest.StashKey[dict[str, int]]()  # what this machine lacks -> how many tests need it

TINY_CONFIG: dict[str, Any] = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 259,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": None,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "attention_layers": ["global", "local"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "dtype": "float16",
}


def tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a causal GPT-Neo checkpoint of this configuration, in file order."""
    width, inner = config["hidden_size"], config["intermediate_size"] or 4 * config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["max_position_embeddings"], width),
    }
    for index in range(config["num_layers"]):
        block = f"transformer.h.{index}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.attn.attention.{name}_proj.weight": (width, width) for name in "qkv"}
        out, up, down = f"{block}.attn.attention.out_proj", f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"
        shapes |= {f"{out}.weight": (width, width), f"{out}.bias": (width,)}
        shapes |= {f"{up}.weight": (inner, width), f"{up}.bias": (inner,)}
        shapes |= {f"{down}.weight": (width, inner), f"{down}.bias": (width,)}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (config["vocab_size"], width)}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and an end-of-text token, number 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": TINY_CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random GPT-Neo checkpoint, the same for the same seed; `changes` go into its config.json."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = TINY_CONFIG | changes
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tiny_shapes(config).items():
        value = torch.randn(shape, generator=random) * 0.2
        if ".ln_" in name and name.endswith(".weight"):
            value = 1 + value
        tensors[name] = value.to(getattr(torch, config["dtype"]))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-Neo with a tokenizer: 2 layers (global, local), hidden 24, window 4, context 32. Read it only."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-neo")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """`make_model("name", seed=1, hidden_size=12)`: a random model of one's own, to damage at will."""

    def make(name: str = "model", **changes: Any) -> Path:
        return write_tiny_model(tmp_path / name, **changes)

    return make


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failed command must print, and nothing but it."""
        lines = self.err.strip().splitlines()
        assert self.code != 0 and len(lines) == 1 and not self.out, self
        return lines[0]


Cli = Callable[..., Result]


class Keyboard(io.StringIO):
    """A standard input that nothing is piped into."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """`cli("generate", folder, stdin="...")`: run one command line in an empty working directory, in this process.

    Starting Python and torch anew costs seconds each time. A command that ends under torchrun ignores signals from then
    on; others in this process, and all that they start, are to be ended by them.
    """
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    workplace = tmp_path / "here"
    workplace.mkdir()
    monkeypatch.chdir(workplace)

    def run(*words: object, stdin: str | None = None) -> Result:
        from neoquant.cli import main

        monkeypatch.setattr("sys.stdin", Keyboard() if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    yield run
    for number, handler in handled.items():
        signal.signal(number, handler)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Three short documents in the Pile's form, two subsets."""
    path = tmp_path / "texts.jsonl"
    documents = [
        ("Github", "def f(x):\n    return x + 1\n"),
        ("ArXiv", "We prove a theorem."),
        ("ArXiv", "Größe: π ≈ 3"),
    ]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": subset}}) for subset, text in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def bare_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for the hub, whose one model `user/neo` is empty; everything is looked for there."""
    from hub_stand_in import serve

    yield from serve(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text and trained weights; the test is skipped where there is none."""
    named = os.environ.get("NEOQUANT_REAL_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    if not (folder / "data" / "pile" / "pile-test-sample.jsonl").is_file():
        pytest.skip(f"no real data at {folder} (set NEOQUANT_REAL_DATA)")
    return folder


@pytest.hookimpl(trylast=True)  # of what -k and -m select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a CUDA device, a browser or an instruction set that is not here; the summary counts it."""
    lacking = [(item, what_is_lacking(item)) for item in items]
    counts = dict(Counter(lack for _, lack in lacking if lack is not None))
    if counts:
        config.hook.pytest_deselected(items=[item for item, lack in lacking if lack is not None])
        items[:] = [item for item, lack in lacking if lack is None]
    config.stash[NOT_RUN] = counts
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist: each one collects every test, and none prints
        config.workeroutput["not_run"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep the counts of a worker of pytest-xdist: they are the same for each."""
    counts = getattr(node, "workeroutput", {}).get("not_run")
    if counts is not None:  # None: the worker crashed
        node.config.stash[NOT_RUN] = counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each thing that this machine lacks."""
    for lack, count in sorted(config.stash.get(NOT_RUN, {}).items()):
        noun = "test needs" if count == 1 else "tests need"
        terminalreporter.write_line(f"NOT RUN: {count:,} {noun} {lack}", yellow=True)


def what_is_lacking(item: pytest.Item) -> str | None:
    """What a test needs and this machine does not have, or None."""
    if item.get_closest_marker("gpu") and not has_cuda():
        return "a CUDA device (make test-gpu)"
    if item.get_closest_marker("browser") and "NEOQUANT_BROWSER" not in os.environ:
        return "Chromium and transformers.js (make test-browser)"
    if marker := item.get_closest_marker("isa"):
        here = runnable_isas()
        if marker.args[0] not in here:
            return f"the instruction set {marker.args[0]} (this machine runs {', '.join(here) or 'none'})"
    return None


@cache
def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def runnable_isas() -> list[str]:
    from neoquant import native

    return native.runnable()
