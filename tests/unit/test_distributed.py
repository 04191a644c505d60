"""Calibrated runs that several processes share: the weights of one process, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ended, Ranks
from safetensors.torch import load_file
from torch import Tensor

import neoquant
from neoquant.calibration.attention_hessian import attention_hessians
from neoquant.calibration.loss_hessian import drawn_uniforms
from neoquant.calibration.memory import estimate_memory
from neoquant.calibration.share import Share
from neoquant.cli import processes
from neoquant.distributed import ProcessGroup
from neoquant.errors import LostProcessError, RequestError
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import SelfAttention
from neoquant.quantizers import Hessian

SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "attention_types": [[["global", "local", "global"], 1]],
    "attention_layers": ["global", "local", "global"],
}
METHODS = {
    "attention": ("--bits", 4, "--type", "gptq", "--group-size", 16),
    "loss": ("--bits", 3, "--type", "gptq", "--group-size", 16, "--objective", "model", "--correction", "0.5"),
    "corrected": ("--bits", 4, "--type", "nf4", "--block-size", 32, "--objective", "layer", "--correction", "1"),
    "ordered": ("--bits", 4, "--type", "gptq", "--group-size", 32, "--order", "dynamic", "--format", "gptq"),
    "mixed": ("--recipe", "mixed.toml"),
}
MIXED = """
name = "mixed"
format = "neoquant"
rules = [
    { match = "*.k_proj", bits = 8, type = "int8" },
    { match = "*.c_fc", keep = true },
    { match = "*", bits = 4, type = "nf4", block_size = 32, quantizer = "gptq" },
]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes work: with a model, a text and a recipe."""
    folder = tmp_path_factory.mktemp("shared")
    write_tiny_model(folder / "plain", **SHAPE)
    (folder / "text.txt").write_text("\n".join(f"line {number}, and some more words" for number in range(80)))
    (folder / "mixed.toml").write_text(MIXED)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[Ranks]:
    ranks = Ranks(folder)
    yield ranks
    ranks.close()


def words(out: str, *options: object, rows: int = 5) -> tuple[object, ...]:
    samples = ("--calibration", "text.txt", "--rows", rows, "--length", 24)
    return ("quantize", "plain", *(options or METHODS["attention"]), *samples, "--out", out)


def contents(folder: Path) -> dict[str, bytes]:
    """Of a made folder; the record says how many processes there were."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kl(made: Path) -> float:
    """Nats a token from the plain model beside it."""
    ids = torch.randint(0, 200, (4, 24), generator=torch.Generator().manual_seed(1))
    plain, other = (neoquant.load(each, dtype="float32", device="cpu")[0] for each in (made.with_name("plain"), made))
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (plain, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "rows", "counts"),
    [*((method, 9, (2, 4)) for method in METHODS), ("attention", 2, (3,)), ("loss", 2, (3,))],
)
def test_the_weights_are_those_of_one_process(
    folder: Path, ranks: Ranks, method: str, rows: int, counts: tuple[int, ...]
) -> None:
    """Several processes, of which some have no samples: the same codes, but where a sum decides a tie."""
    unquantized = "import neoquant.calibration.memory as memory; memory._GRADIENT_TOKENS = 96"  # sees four of nine
    for count in (1, *counts):
        done = ranks(count, *words(f"{method}-{rows}-{count}", *METHODS[method], rows=rows), patch=unquantized)
        assert done.codes == [0] * count, done.err
        assert done.err.count("took ") == 1 and done.out.count("bits per weight") == 1
    one = folder / f"{method}-{rows}-1"
    alone, before = load_file(one / "model.safetensors"), json.loads((one / "calibration.json").read_text())
    expected = kl(one)
    assert "processes" not in before
    for count in counts:
        made = folder / f"{method}-{rows}-{count}"
        found, record = load_file(made / "model.safetensors"), json.loads((made / "calibration.json").read_text())
        assert found.keys() == alone.keys() and record["layers"].keys() == before["layers"].keys()
        assert record["processes"] == count
        assert f"{count} processes shared the samples." in (made / "README.md").read_text()
        first = [name for name in alone if ".h.0." in name]
        described = [name for name in first if ".quant_state." in name]  # the offset of double quantization, as text
        for name in described:
            said, expected_of = (json.loads(bytes(tensors[name].tolist())) for tensors in (found, alone))
            assert said == expected_of | {"nested_offset": pytest.approx(expected_of["nested_offset"], rel=5e-3)}
        first = [name for name in first if name not in described]
        differing = sum(int((found[name] != alone[name]).sum()) for name in first)
        assert differing <= 0.005 * sum(alone[name].numel() for name in first), made
        for layer in (layer for layer in before["layers"] if ".h.0." in layer):
            assert record["layers"][layer]["error"] == pytest.approx(before["layers"][layer]["error"], rel=5e-3)
        assert kl(made) == pytest.approx(expected, rel=0.1)  # a tie in one block changes the sums of the next
    assert not list(folder.glob(".*"))


def test_hidden_states_in_files_and_again(folder: Path, ranks: Ranks) -> None:
    """Each process keeps its own, beside the others'; the same request, the same bytes."""
    config = GPTNeoConfig.from_dict(json.loads((folder / "plain" / "config.json").read_text()))
    need = estimate_memory(config, 9, 24, processes=2)
    limit = f"{(need.memory - 1) / 1e6:.6f}MB"
    assert (
        estimate_memory(config, 9, 24, need.memory - 1, processes=2).spilled
        and need.memory < estimate_memory(config, 9, 24).memory
    )
    for name, options in (("plenty", ()), ("again", ()), ("little", ("--max-memory", limit))):
        done = ranks(2, *words(name, *METHODS["attention"], *options, rows=9))
        assert done.codes == [0, 0], done.err
    plenty, again, little = (contents(folder / name) for name in ("plenty", "again", "little"))
    for made, name in ((again, "again"), (little, "little")):
        assert made.pop("README.md").replace(name.encode(), b"plenty") == plenty["README.md"]
        assert made == {key: value for key, value in plenty.items() if key != "README.md"}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--bits", "nine"), 2, "nine"),
        (("--bits", 4, "--type", "nf4", "--out", "x"), 2, "3 processes share calibrated runs; others round weights as"),
        (
            (*words("x")[2:], "--device", "cuda"),
            2,
            "3 processes on this machine, and 0 CUDA devices: start one for each",
        ),
        ((*words("x")[2:], "--device", "cuda:1"), 2, "--device cuda:1 is one GPU for 3 processes: say --device cuda"),
        (words("text.txt")[2:], 1, "text.txt is a file, expected the name of a new folder"),
        ((*words("x")[2:], "--max-memory", "1MB"), 2, "calibrating needs about"),
        (("--target-bits", 3, "--calibration", "text.txt"), 2, "start it without torchrun"),
        (("--bits", 4, "--type", "gptq", "--group-size", 16, "--out", "x"), 2, "gptq needs calibration samples"),
    ],
)
def test_refusals_are_said_once_before_weights_are_read(
    folder: Path, ranks: Ranks, options: tuple[object, ...], code: int, message: str
) -> None:
    unread = "import neoquant.checkpoint.reader as r; r.Checkpoint.read = r.Checkpoint.view = None"
    before = sorted(folder.iterdir())
    ended = ranks(3, "quantize", "plain", *options, patch=unread)
    assert message in ended.error and code in ended.codes
    assert [path for path in sorted(folder.iterdir()) if path.suffix not in (".out", ".err")] == [
        path for path in before if path.suffix not in (".out", ".err")
    ]


def test_a_signal_that_comes_while_an_error_is_told_leaves_no_traceback(ranks: Ranks) -> None:
    """torchrun sends one as soon as another process has ended, for the same reason."""
    late = (
        "import os, signal, neoquant.cli as c; real = c.explain\n"
        "c.explain = lambda error: (os.kill(os.getpid(), signal.SIGTERM), real(error))[1]"
    )
    for count in (1, 3):
        ended = ranks(count, "quantize", "plain", "--bits", "nine", patch=late)
        assert ended.error == "terminated" and ended.codes == [143] * count


def test_a_dry_run_says_what_each_takes(ranks: Ranks) -> None:
    done = ranks(2, *words("x"), "--dry-run")
    assert done.codes == [0, 0] and done.out.count("a dry run: x was not written") == 1
    assert "5 samples of 24 tokens, shared by 2 processes" in done.out and "of each process" in done.out


AT_BLOCK = """
import os, signal
from neoquant.quantization import sequential
put = sequential._put_in_place
def hooked(linear, row, *rest):
    if rank == {rank} and row.name.endswith("{place}"):
        {deed}
    put(linear, row, *rest)
sequential._put_in_place = hooked
"""
PLACE = "h.1.mlp.c_fc.weight"
DEEDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "fails": "from neoquant.errors import FormatError; raise FormatError('what only this process finds')",
    "bug": "raise ZeroDivisionError('what nobody foresaw')",
}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, ranks: Ranks) -> dict[str, bytes]:
    """What three processes make."""
    assert ranks(3, *words("undisturbed/out")).codes == [0, 0, 0]
    return contents(folder / "undisturbed" / "out")


@pytest.mark.parametrize(("deed", "rank"), [("killed", 0), ("killed", 2), ("fails", 2), ("bug", 0)])
def test_where_one_ends_all_end(
    ranks: Ranks, undisturbed: dict[str, bytes], deed: str, rank: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = ranks(3, *words(str(out)), patch=AT_BLOCK.format(rank=rank, place=PLACE, deed=DEEDS[deed]))
    said = ended.error
    if deed == "fails":
        assert said == "error: what only this process finds"
    elif deed == "bug":
        assert said.startswith("error: ZeroDivisionError: what nobody foresaw")
    else:
        assert "after block 1 of 3: the same command resumes there" in said
        assert "another process of this run has ended" in said or said.startswith("terminated")
    kept = tmp_path / ".out.unfinished"
    partial = [path for path in tmp_path.iterdir() if path != kept]
    assert all(deed == "killed" and rank == 0 and ".out.partial" in path.name for path in partial)
    assert [len(list(place.glob("hidden-1-*"))) for place in (kept, kept / "rank-1", kept / "rank-2")] == [1, 1, 1]
    other = ranks(2, *words(str(out)))  # processes have other samples
    assert "holds an unfinished run of another request (processes was 3, now 2)" in other.error
    resumed = ranks(3, *words(str(out)))
    assert resumed.codes == [0, 0, 0] and resumed.err.count("resuming after block 1 of 3") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(out) == undisturbed


def test_restart_with_another_number(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = ranks(4, *words(str(out)), patch=AT_BLOCK.format(rank=1, place=PLACE, deed=DEEDS["fails"]))
    assert len(list((tmp_path / ".out.unfinished").glob("rank-*"))) == 3 and 0 not in ended.codes
    assert "processes was 4, now not stated" in ranks(1, *words(str(out))).error
    done = ranks(1, *words(str(out)), "--restart")
    assert done.codes == [0] and [path.name for path in tmp_path.iterdir()] == ["out"], done.err


def test_an_interruption_says_once_how_to_go_on(ranks: Ranks, tmp_path: Path) -> None:
    here = tmp_path / "now"
    slow = f"open({str(here)!r}, 'w').close(); import time; time.sleep(60)"
    for rank in (0, 1):
        here.unlink(missing_ok=True)
        patch = AT_BLOCK.format(rank=rank, place=PLACE, deed=slow)
        ended = ranks(2, *words(str(tmp_path / "out")), "--restart", patch=patch, interrupt=str(here))
        hint = "after block 1 of 3: the same command resumes there, --restart starts again"
        assert ended.error == f"interrupted {hint}"
        assert not [path for path in tmp_path.iterdir() if path.name not in ("now", ".out.unfinished")]


KILLED_AT = """
import os, signal
calls = 0
def counted(function):
    def call(*args, **named):
        global calls
        calls += rank == {rank}
        if calls == {call} and rank == {rank}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)
    return call
os.fsync, os.rename, os.unlink, os.replace = map(counted, (os.fsync, os.rename, os.unlink, os.replace))
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(ranks: Ranks, tmp_path: Path) -> None:
    asked = METHODS["loss"]
    assert ranks(2, *words(str(tmp_path / "0" / "out"), *asked)).codes == [0, 0]
    undisturbed, found = contents(tmp_path / "0" / "out"), set()
    for rank, first, step in ((0, 5, 14), (1, 8, 17)):
        for call in range(first, 200, step):
            out = tmp_path / f"{rank}-{call}" / "out"
            patch = KILLED_AT.format(rank=rank, call=call)
            if ranks(2, *words(str(out), *asked), patch=patch).codes == [0, 0]:
                break
            found.add(len(list((out.parent / ".out.unfinished").glob("block-*"))))
            again = ranks(2, *words(str(out), *asked, *(["--force"] if out.exists() else [])))
            assert again.codes == [0, 0], again.err
            assert contents(out) == undisturbed and [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(found) > 2  # blocks were finished when a process was killed


def test_torchrun_itself(folder: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "neoquant"]

    def run(name: str, *options: object) -> Ended:
        command = [sys.executable, *launch, *map(str, words(name, *METHODS["attention"], *options))]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        return Ended([done.returncode], done.stdout, done.stderr)

    done = run("by-torchrun")
    assert done.codes == [0], done.err
    assert done.err.count("took ") == 1 and (folder / "by-torchrun" / "config.json").exists()
    refused = run("by-torchrun")
    assert refused.codes[0] and sum(line.startswith("error: ") for line in refused.err.splitlines()) == 1


@given(count=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_are_stretches_of_all(count: int, size: int) -> None:
    shares = [ProcessGroup(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(rows=st.integers(1, 30), length=st.sampled_from([3, 5000, 9000]), size=st.integers(1, 9))
def test_samples_are_shared_with_those_in_front_that_the_unquantized_model_sees(
    rows: int, length: int, size: int
) -> None:
    ids = torch.arange(rows)[:, None].expand(rows, length)
    shares = [Share.of(ids, ProcessGroup(rank, size)) for rank in range(size)]
    assert sorted(number for share in shares for number in share.numbers) == list(range(rows))
    assert sorted(number for share in shares for number in share.first_numbers) == list(range(shares[0].firsts))
    for share in shares:
        assert list(share.numbers) == sorted(share.numbers) == share.ids[:, 0].tolist()
        assert all(number < share.firsts for number in share.first_numbers) and share.rows == rows
        drawn = drawn_uniforms(share.firsts, 7, 3)[:, list(share.first_numbers)]
        assert torch.equal(drawn_uniforms(share.firsts, 7, 3, share.first_numbers), drawn)


def test_attention_hessians_of_shares_add_up() -> None:
    torch.manual_seed(0)
    config = GPTNeoConfig(hidden_size=12, num_layers=1, num_heads=3, attention_types=[[["global"], 1]], vocab_size=9)
    attention = SelfAttention(config, 0, "eager").eval().requires_grad_(False)
    x = torch.randn(70, 10, 12)
    whole = attention_hessians(attention, [x], 70)
    numbers = [torch.arange(70).remainder(3).eq(rank).nonzero().flatten().tolist() for rank in range(3)]
    parts = [attention_hessians(attention, x[mine].split(4), 70, mine) for mine in numbers]
    for name in ("q_proj", "k_proj"):
        total = sum(part[name] for part in parts)
        assert isinstance(total, Tensor) and torch.allclose(total, whole[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(part["v_proj"], whole["v_proj"]) for part in parts)


def test_a_hessian_of_shares_is_that_of_all() -> None:
    x = torch.randn(500, 300)  # more rows than columns: what is told of the rest is rounding
    whole, mine, theirs = Hessian(300), Hessian(300), Hessian(300)
    whole.add(x)
    mine.add(x[:200])
    theirs.add(x[200:])
    mine.factor(True, 0.01)  # not that of all
    others = iter([theirs._sum, torch.tensor(theirs.rows)])
    mine.add_up(lambda tensor: tensor + next(others))
    assert mine.rows == 500 and torch.allclose(mine.matrix, whole.matrix, rtol=1e-4, atol=1e-5)
    assert torch.allclose(mine.factor(True, 0.01).upper, whole.factor(True, 0.01).upper, rtol=1e-3, atol=1e-4)


def test_each_process_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    first, second, alone = ProcessGroup(2, 4, 0, 2), ProcessGroup(3, 4, 1, 2), ProcessGroup()
    assert [processes.own_device("cuda", group) for group in (first, second, alone)] == ["cuda:0", "cuda:1", "cuda"]
    assert chosen == [0, 1] and processes.own_device("cpu", second) == "cpu"
    assert processes.own_device("cuda:1", alone) == "cuda:1"
    with pytest.raises(RequestError, match="3 processes on this machine, and 2 CUDA devices"):
        processes.own_device("cuda", ProcessGroup(0, 3, 0, 3))


def test_what_unwinds_is_let_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal comes from torchrun, while partial results are being removed."""
    with pytest.raises(processes.Terminated):
        processes._interrupt(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        processes._interrupt(signal.SIGINT, None)
    for error in (KeyboardInterrupt, LostProcessError("gone")):
        try:
            raise error
        except (KeyboardInterrupt, LostProcessError):
            processes._interrupt(signal.SIGTERM, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interruptions_in_destructors_are_not_lost(number: signal.Signals) -> None:
    """Python can raise nothing out of `__del__`: it prints what was raised there, and goes on."""
    program = f"""
import os, signal, time
from neoquant.cli import processes

class Last:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
processes.interrupt_by_signals()
try:
    Last()
    time.sleep(60)
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert not ended.stderr
    assert ended.stdout.strip() == ("Terminated" if number == signal.SIGTERM else "KeyboardInterrupt")


def test_one_process_is_no_group(cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    ended = cli("quantize", tiny_model, "--bits", 4, "--type", "nf4", "--out", "x")
    assert ended.code == 2 and "WORLD_SIZE is 2, but its processes cannot be joined" in ended.error
