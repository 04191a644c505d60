"""From a model folder to one that ONNX Runtime opens; it appears whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from neoquant.checkpoint import companion_files, open_checkpoint
from neoquant.checkpoint.weight_files import CONFIG, is_companion
from neoquant.errors import OutputError, RequestError, locate
from neoquant.files.exchanging import exchange
from neoquant.files.names import output_folder
from neoquant.files.writing import explaining, sync_folder, write_file
from neoquant.loading.load import folder_of, read_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.nn.linear import QuantLinear
from neoquant.onnx.decoder import PAST, PRESENT, decoder
from neoquant.onnx.layers import refuse
from neoquant.progress import SILENT, Progress

ROOM = "onnx"  # where transformers.js looks
GENAI_CONFIG = "genai_config.json"
LARGEST = (1 << 31) - (1 << 20)  # bytes in one file of protobuf


@dataclass(frozen=True)
class OnnxExport:
    """What `export` made: the folder, the model's file in it, and bytes of its weights."""

    folder: Path
    file: Path
    weights_bytes: int
    quantized_layers: int


def export(
    source: str | Path | None,
    out: str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> OnnxExport:
    """Write the folder `out`: onnx/model_*.onnx, config.json, genai_config.json, and the source's tokenizer.

    The file is called as transformers.js calls types: model_bnb4 (nf4, fp4), model_q4 and model_quantized (by the most
    layers' grid), model for a plain model. Weights over 2 GB lie beside it.

    Raises:
        RequestError: ONNX Runtime cannot hold a layer as it is, with what it can; or `out` is the source.
        OutputError: `out` is there (and is not to be replaced by `force`), or cannot be written.
        CheckpointError, FormatError, HubError: the source cannot be read.
    """
    target = output_folder(out)
    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        folder = folder_of(checkpoint)
        _require_free(target, folder, force)
        model = read_model(checkpoint, GPTNeoForCausalLM, dtype="float32", device="cpu", progress=progress)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        with locate(checkpoint.source):
            for name, layer in layers.items():
                if reason := refuse(name.removesuffix(".table"), layer):
                    raise RequestError(f"ONNX Runtime cannot hold this model: {reason}")
            graph, inputs, outputs = decoder(model)
        made = graph.model(inputs, outputs)
        name = f"model{_suffix(layers.values())}.onnx"
        temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.new")
        try:
            with explaining(target):
                (temporary / ROOM).mkdir(parents=True)
            _write(made, temporary / ROOM / name, graph.bytes)
            for path, content in _companions(model, folder, name, graph.bytes).items():
                write_file(temporary / path, content)
            with explaining(target):
                _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return OnnxExport(target, target / ROOM / name, graph.bytes, len(layers))


def _put_in_place(made: Path, target: Path) -> None:
    """Give the folder its name, and what had it, if anything, the other's: there is a whole one at every moment."""
    if not target.exists() or not exchange(made, target):
        if target.exists():
            shutil.rmtree(target)
        made.replace(target)
    sync_folder(target.parent)


def _require_free(target: Path, source: Path, force: bool) -> None:
    if target == source.resolve():
        raise RequestError(f"{target} is the model that is read: name another folder")
    if not target.exists():
        return
    if not force:
        raise OutputError(f"{target} exists; --force replaces it (in Python force=True)")
    if reason := _more_than_an_export(target):
        raise OutputError(f"{target} is no folder of an ONNX model ({reason}), and is not replaced")


def _more_than_an_export(folder: Path) -> str | None:
    """Why a folder is not one that `export` made, or has been given more; None where it may be replaced, which is
    deleting."""
    if not folder.is_dir() or not (folder / ROOM).is_dir():
        return f"it holds no folder {ROOM}"
    if folder == Path.cwd():
        return "it is the current folder"
    if not (folder / CONFIG).is_file():
        return f"it holds no {CONFIG}"
    for entry in folder.iterdir():
        made_here = entry.name in (CONFIG, GENAI_CONFIG) or is_companion(entry.name)
        if entry.name != ROOM and not (made_here and entry.is_file() and not entry.is_symlink()):
            return f"it holds {entry.name} as well"
    for entry in (folder / ROOM).iterdir():
        if not entry.is_file() or not entry.name.endswith((".onnx", ".onnx_data")):
            return f"it holds {ROOM}/{entry.name} as well"
    return None


def _suffix(layers: Any) -> str:
    """What transformers.js puts behind `model` for a type of weights."""
    found = [layer.grid for layer in layers]
    if not found:
        return ""
    grid = max(found, key=found.count)
    return {"nf4": "_bnb4", "fp4": "_bnb4"}.get(grid.name, "_q4" if grid.bits == 4 else "_quantized")


def _write(model: onnx.ModelProto, path: Path, nbytes: int) -> None:
    with explaining(path):
        if nbytes <= LARGEST:
            onnx.save(model, str(path))
        else:
            onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024)


def _companions(model: GPTNeoForCausalLM, folder: Path, file: str, nbytes: int) -> dict[str, str | bytes]:
    """The files beside the model's."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = ["GPTNeoForCausalLM"]
    kind = {"model.onnx": "fp32", "model_quantized.onnx": "q8"}.get(file, file[len("model_") : -len(".onnx")])
    config["transformers.js_config"] = {"dtype": kind, "use_external_data_format": nbytes > LARGEST}
    files: dict[str, str | bytes] = {path.name: path.read_bytes() for path in companion_files(folder)}
    return files | {
        CONFIG: json.dumps(config, indent=2) + "\n",
        GENAI_CONFIG: json.dumps(genai_config(model, f"{ROOM}/{file}"), indent=4) + "\n",
    }


def genai_config(model: GPTNeoForCausalLM, file: str) -> dict[str, Any]:
    """What onnxruntime-genai reads: its documentation's "Configuration reference"."""
    config = model.config
    end = config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else end[0] if isinstance(end, list) else end
    names = {kind: (PAST.format("%d", kind), PRESENT.format("%d", kind)) for kind in ("key", "value")}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": pad,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": config.hidden_size // config.num_heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    **{f"past_{kind}_names": past for kind, (past, _) in names.items()},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{kind}_names": present for kind, (_, present) in names.items()},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
