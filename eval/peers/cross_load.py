"""GPTQ checkpoints across programs: ours in GPTQModel and transformers, theirs in neoquant, logits beside logits.

    python eval/peers/cross_load.py --gptqmodel-python GPTQMODEL/bin/python

GPTQModel runs in an environment of its own (gptqmodel_gptq.py says how it is made; transformers also needs `optimum`),
with its torch backend on the CPU. The model is the bundled one's first two blocks, and for group sizes that do not
divide a row a random one of 96 channels. Everything is computed in float32; what counts is the largest difference of
logits, as a part of the largest logit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import neoquant
from neoquant.calibration.dataset import Calibration, load_calibration
from neoquant.demo import MODEL
from neoquant.grids import Affine
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.loading.save import save_model
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Gptq

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance, versions_in

CASES = Path(__file__).with_name("gptqmodel_cases.py")
BOUND = 1e-4
THROUGH = ("gptqmodel", "transformers")
OURS = [(Affine(bits, 64, symmetric), "static") for bits in (2, 3, 4, 8) for symmetric in (True, False)]
OURS += [(Affine(4, group_size), "static") for group_size in (-1, 16, 32, 128, 256)]
OURS += [(Affine(bits, 64, symmetric), "dynamic") for bits in (2, 3, 4, 8) for symmetric in (True, False)]
THEIRS = [  # what GPTQModel is asked for, group_size 64 where it is not said
    {"bits": 4, "sym": True},
    {"bits": 4, "sym": True, "desc_act": True},
    {"bits": 4, "sym": False},
    {"bits": 4, "sym": False, "desc_act": True},
    {"bits": 4, "sym": True, "format": "gptq_v2"},
    {"bits": 4, "sym": False, "format": "gptq_v2", "desc_act": True},
    {"bits": 4, "sym": True, "group_size": -1, "act_group_aware": False},
    {"bits": 3, "sym": True},
    {"bits": 3, "sym": False},
    {"bits": 2, "sym": True},
    {"bits": 2, "sym": False, "group_size": 16},
    {"bits": 8, "sym": True},
    {"bits": 8, "sym": False, "format": "gptq_v2"},
]
THEIRS_TRANSFORMERS = [{"bits": 4, "sym": True}, {"bits": 4, "sym": False, "desc_act": True}]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel-python", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=ROOT / "eval" / "results" / "cross-load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neoquant-cross-") as temp:
        rows = cross_load(args.gptqmodel_python, Path(temp))
    for row in rows:
        print(f"{row['made_by']:12} {row['read_by']:24} {row['what']:60} {row.get('error') or row['difference']}")
    result = {
        "what": "largest difference of logits between the program that made a GPTQ checkpoint and one that reads it, "
        "as a part of the largest logit; float32 on a CPU",
        "provenance": provenance(("neoquant", "torch")),
        "peer": versions_in(args.gptqmodel_python, ("gptqmodel", "torch", "transformers", "optimum")),
        "bound": BOUND,
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in rows if not row["agrees"]]
    raise SystemExit(f"{len(bad)} of {len(rows)} do not agree" if bad else 0)


def cross_load(python: Path, temp: Path) -> list[Row]:
    """Make, load and compare everything: a row for each checkpoint and reader."""
    source, ragged = first_blocks(temp / "source"), narrow(temp / "narrow")
    calibration = load_calibration("demo", neoquant.load_tokenizer(source), rows=8, length=256)
    torch.save(calibration.ids, temp / "rows.pt")
    torch.save(calibration.ids[:2, :64], temp / "ids.pt")
    jobs, rows = [], []
    for number, (grid, order) in enumerate(OURS):
        folder = temp / f"ours-{number}"
        make_ours(source, folder, grid, order, calibration)
        for reader in THROUGH:
            jobs.append({"folder": str(folder), "through": reader})
            rows.append(
                {"made_by": "neoquant", "read_by": reader, "what": f"{describe(grid)}, activation order {order}"}
            )
    kept = neoquant.Recipe.simple(4, "affine", symmetric=True, keep=["*.h.0.mlp.c_proj"], format="gptq")
    divided = neoquant.Recipe.simple(4, "affine", group_size=64, format="gptq")
    for name, model, recipe, what in (
        ("kept", source, kept, "4 bits, groups of 128, symmetric, to nearest, one layer kept"),
        ("ragged", ragged, divided, "4 bits, groups of 64 in rows of 96, asymmetric, to nearest"),
    ):
        folder = temp / f"ours-{name}"
        neoquant.quantize(model, folder, recipe)
        for reader in THROUGH:
            jobs.append({"folder": str(folder), "through": reader})
            rows.append({"made_by": "neoquant", "read_by": reader, "what": what})
    theirs = [(asked, "gptqmodel") for asked in THEIRS] + [(asked, "transformers") for asked in THEIRS_TRANSFORMERS]
    for number, (asked, maker) in enumerate(theirs):
        asked = {"group_size": 64, "desc_act": False, **asked}
        job = {"source": str(source), "rows": str(temp / "rows.pt"), "asked": asked, "through": maker}
        jobs.append({"folder": str(temp / f"theirs-{number}"), **job})
        rows.append({"made_by": maker, "read_by": "neoquant", "what": json.dumps(asked)})
    for number, job in enumerate(jobs):
        job |= {"ids": str(temp / "ids.pt"), "logits": str(temp / f"logits-{number}.pt")}
    (temp / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(CASES), str(temp / "jobs.json")], env=environment, cwd=temp, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{python} {CASES.name} failed:\n{done.stderr[-4000:]}")
    return [row | compare(job, temp / "ids.pt") for row, job in zip(rows, jobs, strict=True)]


def compare(job: Row, ids: Path) -> Row:
    """The largest difference between our logits of a folder and those that the other program left."""
    failed = Path(job["logits"] + ".error")
    if failed.exists():
        return {"agrees": False, "error": failed.read_text("utf-8").strip().splitlines()[-1]}
    try:
        model, _ = neoquant.load(job["folder"], dtype=torch.float32, device="cpu")
    except neoquant.NeoquantError as error:
        return {"agrees": False, "error": str(error)}
    with torch.inference_mode():
        ours = model(torch.load(ids, weights_only=True)).logits
    theirs = torch.load(job["logits"], weights_only=True)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return {"agrees": difference <= BOUND, "difference": float(f"{difference:.2g}")}


def make_ours(source: Path, folder: Path, grid: Affine, order: str, calibration: Calibration) -> None:
    """A GPTQ checkpoint of ours; a dynamic order, for which there is no recipe, on inputs that are drawn."""
    if order == "static":
        recipe = neoquant.Recipe.simple(
            grid.bits, "affine", group_size=grid.group_size, symmetric=grid.symmetric, quantizer="gptq", format="gptq"
        )
        neoquant.quantize(source, folder, recipe, calibration=calibration)
        return
    model, _ = neoquant.load(source, dtype=torch.float32, device="cpu")
    quantizer, random = Gptq(order=order), torch.Generator().manual_seed(0)
    for name, layer in list(model.transformer.h.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            seen = quantizer.observer(layer.in_features)
            scales = torch.rand(layer.in_features, generator=random) + 0.1
            seen.add(torch.randn(4 * layer.in_features, layer.in_features, generator=random) * scales)
            q = replace(quantizer.quantize(layer.weight.detach(), grid, seen), dtype=torch.float16)
            model.transformer.h.set_submodule(name, QuantLinear(q, layer.bias))
    save_model(model.half(), folder)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())


def first_blocks(folder: Path, blocks: int = 2) -> Path:
    """The bundled model with only its first blocks."""
    model, _ = neoquant.load(MODEL, dtype=torch.float16, device="cpu")
    config = model.config.to_dict() | {"num_layers": blocks, "attention_types": [[["global", "local"], blocks // 2]]}
    config.pop("attention_layers")
    cut = GPTNeoForCausalLM(neoquant.GPTNeoConfig.from_dict(config))
    cut.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in cut.state_dict()})
    save_model(cut.half(), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    return folder


def narrow(folder: Path) -> Path:
    """Random weights, 96 channels: groups of 64 end in one of 32."""
    config = neoquant.GPTNeoConfig.from_pretrained(MODEL).to_dict()
    config |= {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "hidden_size": 96}
    config.pop("attention_layers")
    torch.manual_seed(0)
    save_model(GPTNeoForCausalLM(neoquant.GPTNeoConfig.from_dict(config)).half(), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    return folder


def describe(grid: Affine) -> str:
    groups = "whole rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits} bits, {groups}, {'symmetric' if grid.symmetric else 'asymmetric'}"


if __name__ == "__main__":
    main()
