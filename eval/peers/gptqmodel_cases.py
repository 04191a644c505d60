"""GPTQModel's side of cross_load.py, in GPTQModel's own environment: load folders, or make them, and leave logits.

    python eval/peers/gptqmodel_cases.py JOBS.json

JOBS.json is a list; each job has `folder`, `ids` (a file of int64[B, T]), `logits` (a file to write) and `through`:
`gptqmodel` or `transformers`. One that has `source` first quantizes that folder to `folder`, as `asked` says, on
`rows`. What goes wrong with one job is written to `logits` + ".error" and ends only that job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

Job = dict[str, Any]


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        try:
            if "source" in job:
                make(job)
            logits = run(load(job), torch.load(job["ids"], weights_only=True))
            torch.save(logits, job["logits"])
        except Exception:  # another program's, reported to whoever asked
            Path(job["logits"] + ".error").write_text(traceback.format_exc(), "utf-8")


def make(job: Job) -> None:
    rows = torch.load(job["rows"], weights_only=True)
    if job["through"] == "gptqmodel":
        model = GPTQModel.load(job["source"], QuantizeConfig(**job["asked"]), device="cpu", dtype=torch.float32)
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
        model.save(job["folder"])
        return
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    texts = [tokenizer.decode(row) for row in rows]
    asked = GPTQConfig(**job["asked"], dataset=texts, tokenizer=tokenizer, model_seqlen=rows.shape[1], backend="torch")
    made = AutoModelForCausalLM.from_pretrained(
        job["source"], quantization_config=asked, device_map="cpu", dtype=torch.float16
    )
    made.save_pretrained(job["folder"])
    tokenizer.save_pretrained(job["folder"])


def load(job: Job) -> torch.nn.Module:
    """The model, its plain tensors and scales as they are stored (left to itself GPTQModel makes them bfloat16)."""
    if job["through"] == "gptqmodel":
        found = GPTQModel.load(job["folder"], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    else:
        found = AutoModelForCausalLM.from_pretrained(
            job["folder"],
            device_map="cpu",
            dtype=torch.float16,
            quantization_config=GPTQConfig(bits=4, backend="torch"),  # the backend counts, the rest is the folder's
        )
    layers = {type(module).__name__ for module in found.modules() if hasattr(module, "qweight")}
    if layers != {"TorchLinear"}:
        raise RuntimeError(f"quantized layers are {layers or 'none'}, not TorchLinear")
    return found


def run(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, computed in float32."""
    torch.nn.Module.float(model)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits.clone()


if __name__ == "__main__":
    main()
