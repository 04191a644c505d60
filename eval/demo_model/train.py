"""Train the bundled model: a small GPT-Neo that has read the Python standard library.

    python eval/demo_model/train.py --minutes 90 --work build/demo_model     # resumes from --work if it was stopped
    python eval/demo_model/train.py --work build/demo_model --export neoquant/demo/neoquant-demo

The length is a time, since machines differ: the learning rate follows the share of the time that is used up.
Attention is trained with its scores divided by the root of the head size, since unscaled from the start it stalls;
the export folds that division into q_proj, which makes it a GPT-Neo like any other. Matrices of the blocks are
trained with Muon (Jordan et al., 2024, as in torch.optim), everything else with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Document, training_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import SelfAttention

END_OF_TEXT = "<|endoftext|>"
CONFIG = GPTNeoConfig(
    vocab_size=4096,
    max_position_embeddings=512,
    hidden_size=256,
    num_layers=6,
    attention_types=[[["global", "local"], 3]],
    num_heads=4,
    window_size=128,
    bos_token_id=0,
    eos_token_id=0,
)
BATCH, MICRO_BATCH = 16, 8  # windows of 512 tokens a step, and at once
LIBRARY_REPEATS = 2  # the library's own modules are read this often for each reading of its tests
MUON_LR, ADAM_LR = 0.02, 3e-3
WARM_UP, COOL_DOWN = 0.02, 0.6  # shares of the time: the rate rises at the start, and falls to zero at the end


class Scaled(nn.Module):
    """q_proj's weight as the network sees it while the trained one is larger by the root of the head size."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = head_dim**-0.5

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def train_tokenizer(documents: list[Document], path: Path) -> Tokenizer:
    """A byte-level BPE like GPT-2's, learned from the training text."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    tokenizer.save(str(path))
    return tokenizer


def tokenize(documents: list[Document], tokenizer: Tokenizer, path: Path) -> list[tuple[str, Tensor]]:
    """(subset, ids) of each document, an end of text before each."""
    if not path.exists():
        encoded = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
        torch.save(
            [(d.subset, torch.tensor([0, *e.ids], dtype=torch.int32)) for d, e in zip(documents, encoded, strict=True)],
            path,
        )
    ids: list[tuple[str, Tensor]] = torch.load(path)
    return ids


def windows(ids: list[tuple[str, Tensor]], generator: torch.Generator) -> Iterator[Tensor]:
    """Windows `[T + 1]` for ever: documents shuffled and joined anew for each reading."""
    T = CONFIG.max_position_embeddings
    repeats = [i for i, (subset, _) in enumerate(ids) for _ in range(LIBRARY_REPEATS if subset == "library" else 1)]
    while True:
        order = torch.randperm(len(repeats), generator=generator)
        stream = torch.cat([ids[repeats[i]][1] for i in order.tolist()])
        count = (len(stream) - 1) // T
        for at in torch.randperm(count, generator=generator).tolist():
            yield stream[at * T : at * T + T + 1].long()


def make_model() -> GPTNeoForCausalLM:
    model = GPTNeoForCausalLM(CONFIG).init_weights(seed=0)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            parametrize.register_parametrization(module.q_proj, "weight", Scaled(CONFIG.head_dim))
            with torch.no_grad():
                module.q_proj.parametrizations.weight.original.mul_(math.sqrt(CONFIG.head_dim))
    return model


def make_optimizers(model: GPTNeoForCausalLM) -> list[torch.optim.Optimizer]:
    blocks = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(share: float) -> float:
    """The learning rate at this share of the time, as a share of the full one."""
    return min(1.0, share / WARM_UP, (1.0 - share) / COOL_DOWN)


def train(work: Path, minutes: float) -> None:
    work.mkdir(parents=True, exist_ok=True)
    documents = training_documents()
    tokenizer = train_tokenizer(documents, work / "tokenizer.json")
    ids = tokenize(documents, tokenizer, work / "ids.pt")
    print(f"{len(documents)} documents, {sum(len(i) for _, i in ids):,} tokens", flush=True)
    model, step, spent = make_model(), 0, 0.0
    optimizers = make_optimizers(model)
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        step, spent = state["step"], state["spent"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    batches = windows(ids, torch.Generator().manual_seed(step))
    full = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    began, saved_at, losses = time.monotonic() - spent, time.monotonic(), []
    while (spent := time.monotonic() - began) < minutes * 60:
        share = spent / (minutes * 60)
        for group, lr in zip((g for o in optimizers for g in o.param_groups), full, strict=True):
            group["lr"] = lr * max(rate(share), 1e-3)
        losses.append(one_step(model, optimizers, batches))
        step += 1
        if step % 10 == 0:
            seconds = spent / step
            print(f"{share:6.1%}  step {step}  loss {sum(losses) / len(losses):.4f}  {seconds:.2f} s/step", flush=True)
            losses = []
        if time.monotonic() - saved_at > 240:
            save(state_file, model, optimizers, step, spent)
            saved_at = time.monotonic()
    save(state_file, model, optimizers, step, spent)


def one_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batches: Iterator[Tensor]) -> float:
    """One update from BATCH windows; returns the loss in nats a token."""
    total = 0.0
    for _ in range(BATCH // MICRO_BATCH):
        batch = torch.stack([next(batches) for _ in range(MICRO_BATCH)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (loss * MICRO_BATCH / BATCH).backward()
        total += loss.item() * MICRO_BATCH / BATCH
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def save(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, spent: float) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "spent": spent,
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def export(work: Path, out: Path) -> None:
    """Fold the attention's scale into q_proj and write the model in half precision, with its tokenizer."""
    model = make_model()
    state = torch.load(work / "state.pt")
    model.load_state_dict(state["model"])
    for module in model.modules():
        if isinstance(module, SelfAttention):
            parametrize.remove_parametrizations(module.q_proj, "weight", leave_parametrized=True)
    model.half().eval().save_pretrained(out, force=True)
    (out / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONFIG.max_position_embeddings,
        # transformers 4 adds token_type_ids where a fast tokenizer is silent, and GPT-Neo would add their embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", "utf-8")
    generation_config = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n", "utf-8")
    tokens = state["step"] * BATCH * CONFIG.max_position_embeddings
    print(f"{out}: {state['step']} steps, {tokens:,} tokens, {state['spent'] / 60:.0f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), help="tokenizer, token ids and state")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the trained model here instead of training")
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.work, arguments.export)
    else:
        train(arguments.work, arguments.minutes)


if __name__ == "__main__":
    main()
