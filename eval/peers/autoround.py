"""AutoRound (Cheng et al., arXiv:2309.05516) on given calibration rows: rounding and ranges learned block by block. Its
environment: `pip install auto-round`.

python eval/peers/autoround.py MODEL ROWS.pt OUT --bits 4 --group-size 64 [--symmetric] [--iterations 200]
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from driver import Meter, calibration_rows, most_values, parser, write_dense
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--iterations", type=int, default=200)
    args = options.parse_args()
    rows = calibration_rows(args.rows)
    shown = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json"), eos_token=END, pad_token=END)
    work = Meter()
    with work.running():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tuning = AutoRound(
            model,
            tokenizer,
            bits=args.bits,
            group_size=args.group_size,
            sym=args.symmetric,
            iters=args.iterations,
            nsamples=rows.shape[0],
            seqlen=rows.shape[1],
            dataset=shown,
            batch_size=8,
            device_map="cpu",
            enable_torch_compile=False,
        )
        quantized, _ = tuning.quantize()
    # After the run each weight is already rounded and multiplied out again.
    weights = {
        name: module.weight
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "scale")
    }
    for name, weight in weights.items():
        if most_values(weight.detach().float(), args.group_size) > 2**args.bits:
            raise SystemExit(f"{name}: a group holds more than {2**args.bits} values")
    write_dense(args, weights, work, ("auto-round",))


if __name__ == "__main__":
    main()
