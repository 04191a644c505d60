"""TRL's trainers on quantized models inside transformers: adapters by SFT, DPO and GRPO on the bundled model.

The oracle is TRL on the same model with plain layers of the same values, `dequantize()`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.quantization.recipe import Recipe

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402  # nothing here runs without the others
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from neoquant import transformers as inside  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers, peft and trl warn of much that is not looked at here

RECIPES = {
    "nf4": Recipe.simple(4, "nf4", format="bitsandbytes"),
    "affine": Recipe.simple(4, "affine", group_size=64, format="neoquant"),  # the embedding, too, is quantized
}
EVERY = pytest.mark.parametrize("name", RECIPES)
TEXTS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "import os\nprint(os.getcwd())\n",
    "Two roads diverged in a yellow wood, and sorry I could not travel both.",
] * 8
PAIRS = {"prompt": ["def f(x):"] * 8, "chosen": ["\n    return x\n"] * 8, "rejected": [" yellow wood"] * 8}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The bundled model, quantized by one of RECIPES."""
    root = tmp_path_factory.mktemp("quantized")

    def of(name: str) -> Path:
        if not (root / name).exists():
            neoquant.quantize(None, root / name, RECIPES[name])
        return root / name

    return of


def load(folder: Path) -> Any:
    """By transformers' own call, where the format is neoquant's."""
    source = AutoModelForCausalLM if folder.name == "affine" else inside
    return source.from_pretrained(folder)


def tokenizer_of(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lora() -> Any:
    torch.manual_seed(0)  # of its weights
    return peft.LoraConfig(r=4, target_modules=["q_proj", "c_fc"], task_type="CAUSAL_LM")


def common(out: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out), "max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 2, "bf16": False,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **others,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(a - b) <= 1e-3 * abs(b) + 1e-5 for a, b in zip(found, expected, strict=True)
    )


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


@EVERY
@pytest.mark.parametrize("packing", [False, True], ids=["apart", "packed"])
def test_sft_with_a_checkpoint_that_is_resumed(folder: Folder, tmp_path: Path, name: str, packing: bool) -> None:
    if packing and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4's GPT-Neo takes no packed rows, plain or quantized")
    source = folder(name)
    tokenizer = tokenizer_of(source)

    def trained(model: Any, out: Path, resume: str | None = None) -> Any:
        config = trl.SFTConfig(**common(out, packing=packing, max_length=64, eval_strategy="steps", eval_steps=3))
        data = Dataset.from_dict({"text": TEXTS})
        trainer = trl.SFTTrainer(
            model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=lora()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = trained(load(source), tmp_path / "run")
    plain = trained(load(source).dequantize(), tmp_path / "plain")
    assert close(losses(straight), losses(plain)) and len(losses(straight)) == 3
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (straight, plain)]
    assert close(*evaluated) and len(evaluated[0]) == 1

    resumed = trained(load(source), tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"))
    expected = adapters(straight.model)
    found = adapters(resumed.model)
    assert len(found) == 24 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)

    straight.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "tokenizer.json").exists()
    if name == "affine":  # the adapters' own folder names the model
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")
    else:
        again = peft.PeftModel.from_pretrained(load(source), tmp_path / "final")
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (again, straight.model)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[1].abs().max()


@EVERY
def test_dpo(folder: Folder, tmp_path: Path, name: str) -> None:
    source = folder(name)

    def trained(model: Any, out: Path) -> Any:
        trainer = trl.DPOTrainer(
            model, args=trl.DPOConfig(**common(out, max_length=64)), train_dataset=Dataset.from_dict(PAIRS),
            processing_class=tokenizer_of(source), peft_config=lora(),
        )  # fmt: skip
        trainer.train()
        return trainer

    ours, plain = trained(load(source), tmp_path / "run"), trained(load(source).dequantize(), tmp_path / "plain")
    assert close(losses(ours), losses(plain))
    assert losses(ours)[0] == pytest.approx(0.693147, abs=1e-4)  # both models are one before the first step
    assert losses(ours)[2] < 0.5


@EVERY
def test_completions_are_generated_while_it_trains(folder: Folder, tmp_path: Path, name: str) -> None:
    source, tokenizer = folder(name), tokenizer_of(folder(name))
    prompts = ["def mean(values):", "import"]

    def completions(model: Any, out: Path) -> list[str]:
        data = Dataset.from_dict({"prompt": prompts})
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(**common(out, max_length=64, max_steps=1)),
            train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer, peft_config=lora(),
        )  # fmt: skip
        trainer.eval_dataset = data  # whose prompts the callback continues
        said = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        callback = trl.LogCompletionsCallback(trainer, said, freq=1)
        trainer.add_callback(callback)
        trainer.train()
        return [row[-1] for row in callback.table]

    model = load(source)
    found = completions(model, tmp_path / "run")
    assert len(found) == 2 and found == completions(load(source).dequantize(), tmp_path / "plain")


@EVERY
def test_grpo_learns_from_what_it_generates(folder: Folder, tmp_path: Path, name: str) -> None:
    source, seen = folder(name), []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.append(list(completions))
        return [float(len(set(text))) for text in completions]

    def trained(model: Any, out: Path) -> list[list[str]]:
        seen.clear()
        config = trl.GRPOConfig(
            **common(out, max_steps=2, per_device_train_batch_size=4), num_generations=4, max_completion_length=8
        )
        trainer = trl.GRPOTrainer(
            model, reward, args=config, train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"]}),
            processing_class=tokenizer_of(source), peft_config=lora(),
        )  # fmt: skip
        before = adapters(trainer.model)
        trainer.train()
        assert any(not torch.equal(before[key], value) for key, value in adapters(trainer.model).items())
        return copy.deepcopy(seen)

    found, expected = trained(load(source), tmp_path / "run"), trained(load(source).dequantize(), tmp_path / "plain")
    assert len(found) == 2 and found[0] == expected[0]
