"""Both directions with transformers and bitsandbytes: their files are ours byte for byte, and they run ours.

bitsandbytes decides by the processor how it computes: in evaluation mode, 4-bit layers go through bfloat16 where the
processor has such instructions, and int8 layers round the activations too. In training mode both multiply exactly,
and GPT-Neo without dropout computes the same in either mode; so that is what is compared here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from neoquant.formats import FORMATS, detect
from neoquant.grids import Codebook, Grid, Int8Rows
from neoquant.quantizers import Nearest

transformers = pytest.importorskip("transformers")

THEIRS = {
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
OURS: dict[str, Callable[[str], Grid | None]] = {
    "nf4": lambda layer: Codebook(),
    "fp4 without double quantization": lambda layer: Codebook("fp4", 32, False),
    "mixed": lambda layer: Codebook(
        "nf4" if "attn" in layer else "fp4", 64 if "q_proj" in layer else 32, "mlp" in layer
    ),
    "some kept": lambda layer: (
        None if "h.1.mlp" in layer or layer.endswith("h.0.attn.attention.q_proj") else Codebook()
    ),
    "int8": lambda layer: Int8Rows(),
    "int8, some kept": lambda layer: None if "h.1.mlp" in layer else Int8Rows(),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random model, stored in the named type, whose rows are whole blocks of 32 and 64."""
    folder = tmp_path_factory.mktemp("plain")

    def model(dtype: str) -> Path:
        path = folder / dtype
        return path if path.exists() else write_tiny_model(path, hidden_size=64, num_heads=4, dtype=dtype)

    return model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_their_files_are_ours(
    plain: Callable[[str], Path], tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    source = plain(dtype)
    their_config, stored = quantized_by_transformers(source, tmp_path, dtype, **options)
    weights = load_file(source / "model.safetensors")
    format = detect(their_config, stored)
    assert format is FORMATS["bnb8" if "load_in_8bit" in options else "bnb4"]
    layers = format.quantized(stored)
    assert len(layers) == 12
    grids = {}
    for layer, suffixes in layers.items():
        w = weights[f"{layer}.weight"]
        q = format.decode({suffix: stored[layer + suffix] for suffix in suffixes}, tuple(w.shape), w.dtype)
        assert q.equals(Nearest().quantize(w, q.grid))
        assert {layer + suffix: bits(tensor) for suffix, tensor in format.encode(q).items()} == {
            layer + suffix: bits(stored[layer + suffix]) for suffix in suffixes
        }
        grids[layer] = q.grid
    ours = format.config(grids, [])
    assert ours | {"llm_int8_skip_modules": None} == their_config["quantization_config"]


def test_other_storage_types_are_read(plain: Callable[[str], Path], tmp_path: Path) -> None:
    storage = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}
    _, stored = quantized_by_transformers(plain("float16"), tmp_path, "float16", **storage)
    weights = load_file(plain("float16") / "model.safetensors")
    for layer, suffixes in FORMATS["bnb4"].quantized(stored).items():
        assert stored[f"{layer}.weight"].dtype == torch.bfloat16
        q = FORMATS["bnb4"].decode({suffix: stored[layer + suffix] for suffix in suffixes})
        assert q.equals(Nearest().quantize(weights[f"{layer}.weight"], q.grid))


@pytest.mark.parametrize("choice", OURS.values(), ids=OURS)
def test_they_run_ours(plain: Callable[[str], Path], tmp_path: Path, choice: Callable[[str], Grid | None]) -> None:
    if choice is OURS["mixed"] and transformers.__version__.startswith("4."):
        pytest.skip(f"transformers {transformers.__version__} differs: it refuses NF4 and FP4 in one checkpoint")
    source = plain("float16")
    expected = write_quantized(source, tmp_path / "ours", choice)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.nn.Module.float(theirs)  # their own .float() refuses a quantized model; this casts what is not quantized
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference.load_state_dict(expected, strict=False)
    ids = torch.randint(0, 259, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, found = reference(ids).logits, theirs.train()(ids).logits
    assert (found - ours).abs().max() <= 1e-5 * ours.abs().max()


def quantized_by_transformers(
    source: Path, out: Path, dtype: str, **options: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Let transformers quantize `source` and save it: (config.json, tensors)."""
    quantization = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(out)
    return json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")


def write_quantized(source: Path, out: Path, choice: Callable[[str], Grid | None]) -> dict[str, Tensor]:
    """Quantize the block linears of `source` as chosen and write a folder; returns what the weights now are."""
    out.mkdir()
    tensors, dequantized, grids, kept = {}, {}, {}, []
    format = FORMATS["bnb8" if isinstance(choice("transformer.h.0.attn.attention.k_proj"), Int8Rows) else "bnb4"]
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(("_proj", "c_fc")):
            tensors[name] = tensor
        elif (grid := choice(layer)) is None:
            tensors[name] = tensor
            kept.append(layer)
        else:
            q = Nearest().quantize(tensor, grid)
            tensors |= {layer + suffix: value.clone() for suffix, value in format.encode(q).items()}
            dequantized[name], grids[layer] = q.dequantize(torch.float32), grid
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = format.config(grids, kept)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return dequantized


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
