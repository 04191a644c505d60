"""GPTQ as GPTQModel does it, on given calibration rows. Its environment: `pip install torch setuptools wheel`, then
`pip install --no-build-isolation gptqmodel` (it asks for a newer torch, but 7.7 runs with 2.13: `--no-deps` keeps it).

    python eval/peers/gptqmodel_gptq.py MODEL ROWS.pt OUT --bits 4 --group-size 64 [--symmetric] [--order group-aware] \
        [--gptaq]

The orders: group-aware is GPTQModel's default; desc-act lets groups follow the order; natural has none. With --gptaq
what layers see in the unquantized model counts too (Li et al., arXiv:2504.02692), by GPTQModel's default strength.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Read when they are imported: the fewest workers that GPTQModel runs with, and no minutes of compiling what runs once.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from driver import Meter, calibration_rows, most_values, parser, write_dense
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import GPTAQConfig

ORDERS = {
    "group-aware": {"desc_act": False, "act_group_aware": True},
    "desc-act": {"desc_act": True, "act_group_aware": False},
    "natural": {"desc_act": False, "act_group_aware": False},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--order", choices=ORDERS, default="group-aware")
    options.add_argument("--gptaq", action="store_true", help="correct for what the unquantized model would see")
    options.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq", help="of the packed checkpoint")
    options.add_argument("--packed", type=Path, help="keep GPTQModel's own checkpoint in this folder")
    args = options.parse_args()
    rows = calibration_rows(args.rows)
    shown = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    asked = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        format=FORMAT(args.format),
        gptaq=GPTAQConfig() if args.gptaq else None,
        pack_impl="original",  # the same words, without compiling a C++ extension first
        **ORDERS[args.order],
    )
    packed = args.packed or args.out.with_name(args.out.name + "-packed")
    work = Meter()
    with work.running():
        # Left to itself it would calibrate in bfloat16 on a CPU.
        model = GPTQModel.load(str(args.model), asked, device="cpu", dtype=torch.float32)
        model.quantize(shown, batch_size=1)
        model.save(str(packed))
    weights = multiplied_out(packed)
    for name, weight in weights.items():
        if args.order != "desc-act" and most_values(weight, args.group_size) > 2**args.bits:
            raise SystemExit(f"{name}: a group holds more than {2**args.bits} values")
    write_dense(args, weights, work, ("gptqmodel",))
    if args.packed is None:
        shutil.rmtree(packed)


def multiplied_out(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that GPTQModel reads from its own checkpoint, by module name: float32[O, I]."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    weights = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            weights[name] = module.dequantize_weight().T.float()
    return weights


if __name__ == "__main__":
    main()
