"""A model folder on this machine: where it is, what its config.json says, and which tensors its files hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from neoquant.checkpoint import hub, safetensors_file, torch_file
from neoquant.checkpoint.foreign import explain_file, explain_folder, explain_no_config
from neoquant.checkpoint.stored import Span, Stored
from neoquant.checkpoint.weight_files import CONFIG, GPTQ_CONFIG, WeightFiles, choose_weight_files, is_companion
from neoquant.errors import CheckpointError, ConfigError, RequestError, locate
from neoquant.files.reading import MAX_LARGE_BYTES, check_size
from neoquant.model.names import EMBEDDING, TIED_HEAD


class Tensors(NamedTuple):
    """The tensors of a folder, and what is unusual about its files."""

    stored: list[Stored]
    notes: tuple[str, ...]


def companion_files(folder: Path) -> list[Path]:
    """The files of a model folder that travel with its weights; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_companion(path.name) and path.is_file())


def find_folder(source: str | Path, revision: str | None) -> Path | None:
    """The folder that `source` names; None for an id on the hub.

    A folder of the hub's cache (`models--user--name`) stands for the snapshot that its `refs/main` names.

    Raises CheckpointError for what is neither folder nor id, RequestError for a revision of a folder.
    """
    if str(source) == "":
        raise CheckpointError("the model is named by an empty text: give a folder, or `user/name` on the hub")
    folder = Path(source)
    with reading(folder):
        is_folder, exists = folder.is_dir(), folder.exists()
    if is_folder:
        if revision is not None:
            raise RequestError(f"{source} is a folder, and only models on the hub have revisions (got {revision!r})")
        return _snapshot(folder)
    if exists:
        hint = f" (perhaps {folder.parent})" if (folder.parent / CONFIG).is_file() else ""
        raise CheckpointError(f"{source} is a file, expected a model folder{hint}")
    if not hub.is_model_id(str(source)):
        raise CheckpointError(f"there is no folder {str(source)!r}, and it cannot be a model on the hub (`user/name`)")
    return None


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json, with the `quantization_config` of AutoGPTQ's own file where it has none; and notes.

    Raises ConfigError for what does not describe a GPT-Neo, CheckpointError where there is no such file.
    """
    path, stated_apart = folder / CONFIG, folder / GPTQ_CONFIG
    with reading(folder):
        if not path.is_file():
            raise CheckpointError(explain_no_config(path.name for path in folder.iterdir()))
    with reading(path):
        config = _read_object(path)
        kind = config.get("model_type")
        if kind != "gpt_neo":
            raise ConfigError(f"model_type is {kind!r}, expected 'gpt_neo': only GPT-Neo is supported")
    if config.get("quantization_config") is not None or not stated_apart.is_file():
        return config, ()
    with reading(stated_apart):
        config["quantization_config"] = {"quant_method": "gptq", **_read_object(stated_apart)}
    return config, (f"quantization_config is read from {GPTQ_CONFIG}, since config.json has none",)


def files_of(folder: Path) -> WeightFiles:
    """The files that hold the weights. Raises CheckpointError where none do, or it cannot be decided which."""
    with reading(folder):
        names = [path.name for path in folder.iterdir()]
        files = choose_weight_files(name for name in names if (folder / name).is_file())
        if files is None:
            raise CheckpointError(explain_folder(names))
    return files


def list_tensors(folder: Path, weights: WeightFiles, tied: bool) -> Tensors:
    """The tensors of `weights`; of shards, in the order of their names.

    `tied` says that a head which the index lists need not be there.
    """
    notes = [] if weights.note is None else [weights.note]
    if weights.index_file is None:
        parts = [_list_file(folder / name) for name in weights.files]
        _file_of_each(stored := [entry for part in parts for entry in part.stored])
    else:
        stored, parts = _list_shards(folder / weights.index_file, tied)
    notes += dict.fromkeys(note for part in parts for note in part.notes)
    return Tensors(stored, tuple(notes))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Put the path in front of every error, and turn the system's errors into ours."""
    with locate(str(path)):
        try:
            yield
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _snapshot(folder: Path) -> Path:
    """The folder itself; of a folder of the hub's cache, the snapshot in it."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    with reading(folder):
        if (folder / CONFIG).exists() or not snapshots.is_dir():
            return folder
        if main.is_file():
            found = snapshots / main.read_text("utf-8")[:64].strip()
            if found.parent == snapshots and found.is_dir():
                return found
        inside = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(inside) == 1:
        return inside[0]
    listed = f"it holds {', '.join(path.name for path in inside[:5])}" if inside else "it holds none"
    raise CheckpointError(
        f"{folder} is a folder of the hub's cache without refs/main: name one of {snapshots}/... ({listed})"
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else."""
    check_size(path)
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if what := explain_file(path):
            raise ConfigError(what) from None
        raise ConfigError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError("not a JSON object")
    return value


def _list_file(path: Path) -> Tensors:
    with reading(path):
        if what := explain_file(path):
            raise CheckpointError(what)
        if path.suffix == ".safetensors":
            spans = safetensors_file.list_tensors(path)
            return Tensors([Stored(header, path, Span(begin, ())) for header, begin in spans], ())
        found = torch_file.list_tensors(path)
        stored = [Stored(header, path, place) for header, place in found.tensors]
        if found.key is None:
            return Tensors(stored, ())
        return Tensors(stored, (f"the tensors stand under {found.key!r}; what is beside them is left out",))


def _list_shards(index_file: Path, tied: bool) -> tuple[list[Stored], list[Tensors]]:
    """The tensors of every shard that an index names, all together and shard by shard."""
    with reading(index_file):
        shard_of = _parse_index(index_file)
        shards = [index_file.parent / name for name in sorted(set(shard_of.values()))]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"names the shard {shard.name}, which is missing; download or copy it again")
    parts = [_list_file(shard) for shard in shards]
    stored = [entry for part in parts for entry in part.stored]
    file_of = _file_of_each(stored)
    for name, file in file_of.items():
        if shard_of.get(name) != file.name:
            listed = shard_of.get(name, "no shard")
            raise CheckpointError(f"{file}: holds tensor {name!r}, which {index_file.name} puts in {listed}")
    for name, shard_name in shard_of.items():
        listed_twice = tied and name == TIED_HEAD and EMBEDDING in file_of
        if name not in file_of and not listed_twice:
            raise CheckpointError(
                f"{index_file.parent / shard_name}: lacks tensor {name!r} that {index_file.name} promises"
            )
    return stored, parts


def _file_of_each(stored: list[Stored]) -> dict[str, Path]:
    """Tensor -> its file. Raises CheckpointError for one that is in two files."""
    file_of: dict[str, Path] = {}
    for header, file, _ in stored:
        if header.name in file_of:
            raise CheckpointError(f"{file}: tensor {header.name!r} is also in {file_of[header.name].name}")
        file_of[header.name] = file
    return file_of


def _parse_index(path: Path) -> dict[str, str]:
    """Tensor -> shard."""
    check_size(path, MAX_LARGE_BYTES)
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        legal = isinstance(shard_of, dict)
        for name, shard in shard_of.items():
            if not isinstance(shard, str) or shard != Path(shard).name or not shard:
                raise CheckpointError(
                    f"weight_map gives {shard!r:.100} for {name!r:.100}, expected a file of this folder"
                )
    except OSError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        legal = False
    if not legal or not shard_of:
        if what := explain_file(path):
            raise CheckpointError(what)
        raise CheckpointError("not an index: expected a JSON object whose `weight_map` gives each tensor's file here")
    return dict(shard_of)
