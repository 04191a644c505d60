"""The simulated device refuses what CUDA refuses, and counts what it is asked for; planted faults are caught."""

from __future__ import annotations

import pytest
import torch

from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model import gpt_neo
from neoquant.model.config import GPTNeoConfig
from simulated_cuda.device import CUDA, Counts

CONFIG = GPTNeoConfig(
    vocab_size=61, max_position_embeddings=48, hidden_size=32, num_heads=2, num_layers=2, window_size=5,
    attention_types=[[["global", "local"], 1]],
)  # fmt: skip
TWO = "at least two devices"


def test_tensors_of_two_devices_do_not_mix(gpu: Counts) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == CUDA == (there + 1).device == there.to("cuda").device
    for mix in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.add_(here)):
        with pytest.raises(RuntimeError, match=TWO):
            mix()
    with pytest.raises(RuntimeError, match="indices should be"):
        here[torch.tensor([0], device="cuda")]
    with pytest.raises(RuntimeError, match="generator"):
        there.normal_(generator=torch.Generator())
    with pytest.raises(AssertionError, match="address"):
        there.data_ptr()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]


def test_launches_waits_and_copies_are_counted(gpu: Counts) -> None:
    x = torch.ones(4, 6, device="cuda")
    gpu.reset()
    for view in (x.t(), x.view(-1), x[1:], x.expand(2, 4, 6), x.detach(), torch.empty_like(x), x.to("cuda")):
        assert view.device == CUDA
    assert gpu.totals() == (0, 0, 0)
    y = (x @ x.t()).relu()
    assert gpu.totals() == (2, 0, 0)
    bool(y.any())
    y.cpu()
    y[y > 0]
    assert gpu.waits.total() == 3
    torch.tensor([1, 2], device="cuda")
    y.copy_(torch.zeros(4, 4))
    assert gpu.copies.total() == 2


def test_numbers_are_the_cpus(gpu: Counts) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    assert torch.equal((a.cuda() @ b.cuda()).softmax(-1).cpu(), (a @ b).softmax(-1))


def mask_on_the_cpu(T: int, S: int, window: int | None, keep: object, device: torch.device) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def windows_on_the_cpu(self: gpt_neo.AttentionMasks, B: int, keys: int) -> torch.Tensor:
    W, n = self.window, -(-self.T // self.window)
    return torch.ones(B * n, 1, W, 2 * W, dtype=torch.bool).tril(W)


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_a_mask_on_the_cpu_is_caught(gpu: Counts, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    model = GPTNeoForCausalLM(CONFIG).init_weights(seed=0).eval().to("cuda")
    ids = torch.zeros(1, 9, dtype=torch.long, device="cuda")
    keep = torch.arange(9, device="cuda")[None] > 0  # padding: all layers have masks
    with torch.inference_mode():
        assert model(ids, keep).logits.device == CUDA
        if local:
            monkeypatch.setattr(gpt_neo.AttentionMasks, "windows", windows_on_the_cpu)
        else:
            monkeypatch.setattr(gpt_neo, "attention_mask", mask_on_the_cpu)
        with pytest.raises(RuntimeError, match="attn_mask on the same device"):
            model(ids, keep)


def test_a_table_on_the_cpu_is_caught(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    from neoquant.grids import Codebook, decoding
    from neoquant.quantizers import Nearest

    q = Nearest().quantize(torch.randn(8, 64), Codebook()).to(CUDA)
    assert q.dequantize(torch.float32).device == CUDA
    monkeypatch.setattr(decoding, "tensor_of", lambda table, device: torch.tensor(table))
    with pytest.raises(RuntimeError, match=TWO):
        q.dequantize(torch.float32)


def test_what_is_fetched_without_waiting_is_there_when_the_host_has_waited(gpu: Counts) -> None:
    x, event = torch.arange(3, device="cuda"), torch.cuda.Event()
    gpu.reset()
    first = (2 * x).to("cpu", non_blocking=True)
    event.record()
    second = torch.zeros(3, dtype=torch.long, pin_memory=True).copy_(x, non_blocking=True)
    assert first.is_pinned() and gpu.waits.total() == 0 and gpu.transfers.total() == 2
    assert not event.query() and min(first) < 0 and min(second) < 0  # nobody knows what
    event.synchronize()
    assert event.query() and first.tolist() == [0, 2, 4] and min(second) < 0
    bool(x.any())  # the host waits for all that was asked before
    assert second.tolist() == [0, 1, 2] and gpu.waits.total() == 2


def test_memory_that_is_not_pinned_is_waited_for(gpu: Counts) -> None:
    x = torch.arange(3, device="cuda")
    gpu.reset()
    assert torch.zeros(3, dtype=torch.long).copy_(x, non_blocking=True).tolist() == [0, 1, 2]
    torch.ones(3).to("cuda", non_blocking=True)
    assert (gpu.waits.total(), gpu.copies.total(), gpu.transfers.total()) == (1, 1, 0)
    torch.ones(3).pin_memory().to("cuda")
    assert gpu.copies.total() == 2
    with pytest.raises(RuntimeError, match="cannot pin"):
        x.pin_memory()


def test_pinned_memory_may_be_used_again_when_its_copy_is_through(gpu: Counts) -> None:
    buffer, event = torch.tensor([1.0, torch.nan]).pin_memory(), torch.cuda.Event()
    sent = buffer.to("cuda", non_blocking=True)
    event.record()
    event.synchronize()
    buffer.zero_()
    assert sent.cpu()[0] == 1
    buffer.to("cuda", non_blocking=True)
    buffer[1] = 3
    with pytest.raises(AssertionError, match="written while it was copied"):
        torch.cuda.synchronize()
    torch.ones(5).pin_memory().to("cuda", non_blocking=True)  # whose memory nobody else has
    torch.cuda.synchronize()


def test_what_a_recording_would_have_to_repeat_is_refused(gpu: Counts) -> None:
    x, memory = torch.ones(3, device="cuda"), torch.ones(3).pin_memory()
    for work in (lambda: x.to("cpu", non_blocking=True), lambda: memory.to("cuda", non_blocking=True)):
        with pytest.raises(RuntimeError, match="transfer"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()


def test_gradients_are_the_cpus(gpu: Counts) -> None:
    """To the bit, also where several are added up; what was not used has none."""
    random = torch.Generator().manual_seed(0)
    x, w, given = (torch.randn(shape, generator=random) for shape in ((2, 5, 8), (24, 8), (2, 5, 8)))

    def attended(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.nn.functional.layer_norm(x, (8,)) @ w.T).view(2, 1, 5, 24).chunk(3, -1)
        return x + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)[:, 0]

    def found(device: str) -> list[torch.Tensor]:
        leaves = [x.to(device).requires_grad_(), w.to(device).requires_grad_()]
        made = torch.autograd.grad([attended(*leaves), leaves[1].sum()], leaves, [given.to(device), w[0, 0].to(device)])
        return [gradient.cpu() for gradient in made]

    assert all(torch.equal(a, b) for a, b in zip(found("cuda"), found("cpu"), strict=True))
    leaf = x.cuda().requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(leaf.sum(), w.cuda().requires_grad_())
