"""Every snippet of docs/guide.md runs as it stands, with the bundled model in the place of those on the hub.

Where a machine has no GPU or lacks flash-attn, a snippet that asks for it is refused with one line, and then run
without it.
"""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from neoquant.checkpoint.hub import HubModel
from neoquant.demo import MODEL
from neoquant.errors import RequestError

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]

NEEDS_GPU = {"device=0": 'device="cpu"', '"flash_attention_2"': '"sdpa"'}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub on which every model of EleutherAI's is the bundled one."""

    def find(source: str, revision: str | None) -> HubModel:
        assert source in {"EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B"} and revision in (None, "0" * 40)
        return HubModel(source, "0" * 40, MODEL, None)

    monkeypatch.setattr("neoquant.checkpoint.hub.find", find)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: str(PYTHON.index(code)))
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_a_snippet_runs(code: str) -> None:
    for package in ("peft", "trl"):
        if f"from {package} import" in code and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for asked, instead in NEEDS_GPU.items():
        if asked in code and not torch.cuda.is_available():
            with pytest.raises(RequestError, match=r"has 0 CUDA devices|not possible here"):
                exec(code, {})
            code = code.replace(asked, instead)
    exec(code, {})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(cli: Any, line: str) -> None:
    said, _, command = line.rpartition(" | ")
    words = shlex.split(command)
    if "--device" in words and not torch.cuda.is_available():
        assert cli(*words[1:], stdin="x").error.endswith("has 0 CUDA devices")
        words[words.index("--device") + 1] = "cpu"
    piped = shlex.split(said)[-1].replace("\\n", "\n")
    result = cli(*words[1:], stdin=piped + "\n")
    assert (words[0], result.code) == ("neoquant", 0), result
    assert "tokens/s" in result.err and (words[1] == "chat" or result.out.startswith(piped))


def test_the_pages_own_snippets_are_there_to_the_letter() -> None:
    """But for the import: what is copied from the page must work here."""
    everything = "\n".join(code for _, code in BLOCKS)
    for line in (
        'pipeline = pipeline(task="text-generation", model="EleutherAI/gpt-neo-1.3B", dtype=torch.float16, device=0)',
        'device_map="auto", attn_implementation="flash_attention_2")',
        'input_ids = tokenizer("Hello, I\'m a language model", return_tensors="pt").to(model.device)',
        "--task text-generation --model EleutherAI/gpt-neo-1.3B --device 0",
        '    bnb_4bit_compute_dtype="float16",\n    bnb_4bit_use_double_quant=True\n',
        "outputs = model.generate(**inputs, max_new_tokens=100)",
        "gen_text = tokenizer.batch_decode(gen_tokens)[0]",
    ):
        assert line in everything
