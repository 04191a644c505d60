"""GPTQ as llm-compressor does it, on given calibration rows. Its environment: `pip install llmcompressor datasets`.

python eval/peers/llmcompressor_gptq.py MODEL ROWS.pt OUT --bits 4 --group-size 64 [--symmetric] [--actorder static]
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from driver import Meter, calibration_rows, most_values, parser, write_dense
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--actorder", choices=("static", "group", "none"), default="static")
    args = options.parse_args()
    rows = calibration_rows(args.rows)
    shown = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    grid = QuantizationArgs(
        num_bits=args.bits,
        type="int",
        symmetric=args.symmetric,
        strategy="group",
        group_size=args.group_size,
        actorder=None if args.actorder == "none" else args.actorder,
    )
    fallen_back = watch_fallbacks()
    modifier = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=grid)}, ignore=["lm_head"]
    )
    work = Meter()
    with work.running():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        oneshot(
            model=model,
            dataset=shown,
            recipe=modifier,
            max_seq_length=rows.shape[1],
            num_calibration_samples=rows.shape[0],
            shuffle_calibration_samples=False,
        )
    if fallen_back:
        raise SystemExit(f"llm-compressor rounded {len(fallen_back)} layers to nearest: {fallen_back[:3]}")
    # After the run each weight is already rounded and multiplied out again, in float32.
    weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    for name, weight in weights.items():
        if args.actorder != "group" and most_values(weight.detach(), args.group_size) > 2**args.bits:
            raise SystemExit(f"{name}: a group holds more than {2**args.bits} values")
    write_dense(args, weights, work, ("llmcompressor", "compressed-tensors"))


def watch_fallbacks() -> list[str]:
    """A list that will hold the names of layers whose Hessian llm-compressor could not invert."""
    seen: list[str] = []
    finalize = GPTQModifier.on_finalize

    def watched(self: Any, *given: Any, **options: Any) -> Any:
        seen.extend(self._rtn_fallback_module_names)
        return finalize(self, *given, **options)

    GPTQModifier.on_finalize = watched
    return seen


if __name__ == "__main__":
    main()
