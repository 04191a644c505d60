"""HQQ as the library `hqq` does it, with its defaults. Its environment: `pip install hqq transformers`.

python eval/peers/hqq_library.py MODEL OUT --bits 3 --group-size 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from driver import LINEARS, Meter, write_dense
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path, help="a folder with a GPT-Neo in one model.safetensors")
    options.add_argument("out", type=Path, help="the folder to make")
    options.add_argument("--bits", type=int, required=True)
    options.add_argument("--group-size", type=int, required=True)
    args = options.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=1)
    work, weights = Meter(), {}
    with work.running():
        for name, module in model.named_modules():
            if name.endswith(LINEARS):
                layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
                weights[name] = layer.dequantize().float()
    write_dense(args, weights, work, ("hqq",))


if __name__ == "__main__":
    main()
