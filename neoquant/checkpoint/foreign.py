"""What files are that look like a model and are none that can be read, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from neoquant.checkpoint.weight_files import CONFIG, WEIGHT_FILES

_READ_BYTES = 512  # of a file's beginning

_BEGINNINGS = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"),
    (b"\x89HDF\r\n", "is an HDF5 file, as TensorFlow and Keras write it: save the model with PyTorch"),
    (b"GGUF", "is a GGUF file, as llama.cpp writes it: give the model it was made from"),
    (b"<!DOCTYPE html", "is a web page, not the file: download it again (from /resolve/, not /blob/)"),
    (b"<html", "is a web page, not the file: download it again (from /resolve/, not /blob/)"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\xfd7zXZ", "is compressed by xz: unpack it"),
    (b"(\xb5/\xfd", "is compressed by zstd: unpack it"),
)

# Pattern of a name in the folder -> what the folder is. The first that matches counts.
_FOLDERS = (
    (r"checkpoint-\d+", "a training run keeps its models in folders of their own: name one of them, as {}"),
    (
        r"adapter_config\.json",
        "it is an adapter (LoRA): load the model it was trained on, then load_peft_model with this folder",
    ),
    (
        r".*\.msgpack(\.index\.json)?",
        "{} holds Flax weights: transformers 4 converts them, "
        "GPTNeoForCausalLM.from_pretrained(folder, from_flax=True).save_pretrained(out)",
    ),
    (
        r".*\.h5(\.index\.json)?",
        "{} holds TensorFlow weights, and transformers has no GPT-Neo for TensorFlow: save the model with PyTorch",
    ),
    (
        r"model\.ckpt-\d+\.(index|meta|data-.*)",
        "{} is of a Mesh TensorFlow checkpoint, GPT-Neo's first code: transformers converts it, "
        "python -m transformers.models.gpt_neo.convert_gpt_neo_mesh_tf_to_pytorch",
    ),
    (
        r"shard_\d+|step_\d+|\d+\.npz",
        "{} is of a Mesh Transformer JAX checkpoint: convert it with the tools of that repository",
    ),
    (
        r"zero_to_fp32\.py|global_step\d+|.*_optim_states\.pt",
        "{} is of a DeepSpeed checkpoint: python zero_to_fp32.py . pytorch_model.bin makes its weights",
    ),
    (r"qmodel\.pt", "{} holds weights quantized by hqq: give the model they were made from"),
    (r".*\.gguf", "{} is a GGUF file, as llama.cpp writes it: give the model it was made from"),
    (r".*\.onnx", "{} is an ONNX file: give the model it was exported from"),
)


def explain_folder(names: Iterable[str]) -> str:
    """Why a folder of these files and folders holds no weights that can be read, and what it holds instead."""
    return f"holds no weights that can be read, expected one of {', '.join(WEIGHT_FILES)}{_instead(names)}"


def explain_no_config(names: Iterable[str]) -> str:
    """Why a folder of these files and folders is no model folder, and what it is instead."""
    return f"holds no {CONFIG}, so it is not a model folder{_instead(names)}"


def _instead(names: Iterable[str]) -> str:
    names = sorted(names)
    for pattern, what in _FOLDERS:
        for name in names:
            if re.fullmatch(pattern, name):
                return f"; {what.format(name)}"
    return ""


def explain_file(path: Path) -> str | None:
    """What a file is, by its first bytes, if that is a known kind that is not read.

    Raises OSError where it cannot be opened.
    """
    with path.open("rb") as file:
        read = file.read(_READ_BYTES)
    if path.suffix != ".safetensors" and read[8:10] == b'{"' and b'"data_offsets"' in read:
        return "is a safetensors file by another name: call it model.safetensors"
    beginning = read.lstrip()
    for begins, what in _BEGINNINGS:
        if beginning[: len(begins)].lower() == begins.lower():
            return what
    return None
