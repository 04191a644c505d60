"""What outputs lack in a model that is being quantized: against hooks on whole models; what making up for it gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from torch import Tensor, nn

from neoquant.calibration.block_forward import BlockForward
from neoquant.calibration.hidden_states import HiddenStatesInMemory
from neoquant.calibration.missing_output import ADDED, MissingOutput, UnquantizedBlock
from neoquant.errors import RequestError
from neoquant.grids import Affine
from neoquant.loading.load import load_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.names import BLOCK_LINEARS
from neoquant.quantizers import Gptq, Hessian


def inputs_and_output(model: nn.Module, block: nn.Module, layer: str, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer of `block` sees and gives in a whole model, and the hidden states that its output is added to."""
    seen: dict[str, Tensor] = {}

    def watch(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(x=given[0], y=output)

    def added(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(hidden=given[0])

    norm = "ln_1" if layer.startswith("attn") else "ln_2"
    hooks = [
        block.get_submodule(layer).register_forward_hook(watch),
        block.get_submodule(norm).register_forward_hook(added),
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["y"], seen["hidden"]


def states_around_blocks(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What each block of a whole model sees and what is behind its attention, in turn, and what the last one gives."""
    states: list[Tensor] = []
    seen = [layer for block in model.transformer.h for layer in (block.ln_1, block.ln_2)]
    hooks = [
        layer.register_forward_hook(lambda _, given, output: states.append(given[0]))
        for layer in (*seen, model.transformer.ln_f)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("rows", [5, 3])
@torch.inference_mode()
def test_against_whole_models(rows: int, tmp_path: Path) -> None:
    """`rows` of the five that the quantized model sees are known of the unquantized one."""
    folder = write_tiny_model(tmp_path / "plain", num_layers=2)
    changed, plain = (load_model(folder, GPTNeoForCausalLM, dtype=torch.float32) for _ in range(2))
    ids = torch.randint(0, 200, (5, 20), generator=torch.Generator().manual_seed(0))
    embedded = plain.transformer.wte(ids) + plain.transformer.wpe(torch.arange(20))
    window = plain.config.window_size
    forward = BlockForward(HiddenStatesInMemory.of(embedded.clone(), 2 * 20), window)
    known = states_around_blocks(plain, ids[:rows])
    quantized = 0
    for number, (block, original) in enumerate(zip(changed.transformer.h, plain.transformer.h, strict=True)):
        before, behind, after = (HiddenStatesInMemory.of(x.clone(), 2 * 20) for x in known[2 * number : 2 * number + 3])
        unquantized = UnquantizedBlock(block, before, behind, after)
        for stage in forward.stages(block):
            missing = MissingOutput(stage, forward.hidden, unquantized)
            shown = torch.cat(list(missing.gather()))
            for name in stage.linears:
                x, y, hidden = inputs_and_output(changed, block, name, ids)
                _, aim, hidden_aim = inputs_and_output(plain, original, name, ids)
                assert torch.allclose(shown, x, atol=1e-5)
                x, y, hidden, aim, hidden_aim = (each[:rows] for each in (x, y, hidden, aim, hidden_aim))
                lacking = aim - y + (hidden_aim - hidden if name in ADDED else 0)
                pairs = zip(lacking.flatten(0, 1).double(), x.flatten(0, 1).double(), strict=True)
                expected = sum(torch.outer(e, each) for e, each in pairs) * 2 / ids[:rows].numel()
                assert torch.allclose(missing.of(name).double(), expected, atol=1e-4 * float(x.abs().max()) ** 2), name
                assert bool(expected.any()) == (quantized > 0), name  # the first layers see what they saw
            for linear in stage.linears.values():
                linear.weight = nn.Parameter((linear.weight * 8).round() / 8, requires_grad=False)
                quantized += 1
    assert quantized == 2 * len(BLOCK_LINEARS)


@pytest.mark.parametrize("ordered", [True, False])
def test_solved_by_the_factor(ordered: bool) -> None:
    random = torch.Generator().manual_seed(0)
    hessian, missing = Hessian(40), torch.randn(7, 40, generator=random)
    hessian.add(torch.randn(300, 40, generator=random) * torch.rand(40, generator=random))
    H = hessian.matrix.double()
    H.diagonal().add_(0.05 * H.diagonal().mean())
    expected = torch.linalg.solve(H, missing.double().T).T
    assert torch.allclose(hessian.solve(missing, ordered, 0.05).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ["static", "off", "dynamic"])
def test_a_corrected_weight_gives_more_of_what_was_lacking(order: str) -> None:
    random = torch.Generator().manual_seed(1)
    w, aim = torch.randn(24, 32, generator=random), torch.randn(800, 32, generator=random)
    mixing = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=random)
    x = aim @ mixing
    hessian = Hessian(32)
    hessian.add(x)
    missing = (2 / len(x)) * ((aim - x) @ w.T).T @ x

    def lost(correction: float) -> float:
        q = Gptq(order, damping=1e-4, correction=correction).quantize(w, Affine(8, 32), hessian, None, missing)
        return float((aim @ w.T - x @ q.dequantize(torch.float32).T).square().mean())

    losses = [lost(part) for part in (0.0, 0.5, 1.0)]
    assert losses[1] < 0.3 * losses[0] and losses[2] < 0.1 * losses[1]
    # half of the way leaves half of the error, and a quarter of its square
    assert losses[1] == pytest.approx(losses[0] / 4, rel=0.05)


def test_nothing_lacking_or_no_correction_changes_nothing() -> None:
    random = torch.Generator().manual_seed(2)
    w, hessian = torch.randn(8, 32, generator=random), Hessian(32)
    hessian.add(torch.randn(90, 32, generator=random))
    plain = Gptq().quantize(w, Affine(3, 32), hessian).codes
    nothing = Gptq(correction=0.5).quantize(w, Affine(3, 32), hessian, None, torch.zeros(8, 32)).codes
    unused = Gptq(correction=0.0).quantize(w, Affine(3, 32), hessian, None, torch.ones(8, 32)).codes
    assert torch.equal(plain, nothing) and torch.equal(plain, unused)
    with pytest.raises(RequestError, match=r"missing output \[8, 31\] is not that of a weight \[8, 32\]"):
        Gptq(correction=0.5).quantize(w, Affine(3, 32), hessian, None, torch.zeros(8, 31))
    with pytest.raises(RequestError, match=r"correction 1.5: legal is 0 \(none\) to 1"):
        Gptq(correction=1.5)
