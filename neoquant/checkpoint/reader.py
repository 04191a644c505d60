"""Open a model folder or hub id: its configuration, its tensors' names and shapes, and each tensor when asked for.

Opening reads headers only. `read` copies a tensor into memory of its own; `view` maps it where it lies in the file,
which copies nothing, and `forget` gives such memory back as soon as the tensor has been dealt with: pages of a memory
map count against the process until then, or until the system wants them back.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch

from neoquant import demo
from neoquant.checkpoint import hub, torch_file
from neoquant.checkpoint.headers import MAX_HEADER_BYTES, TensorHeader, parse_header
from neoquant.checkpoint.torch_file import Span
from neoquant.errors import CheckpointError, ConfigError, RequestError, locate
from neoquant.model.names import is_mask_buffer
from neoquant.progress import SILENT, Progress

# In order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Files that travel with the weights, whatever happens to them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


class Stored(NamedTuple):
    """A tensor and where it is: in a file, or (of the few files that must be loaded whole) in memory."""

    header: TensorHeader
    file: Path
    place: Span | torch.Tensor


class Checkpoint:
    """An opened checkpoint. Use it in a `with` block: files stay open from their first read until `close`.

    Attributes:
        source: what was asked for, a folder or a hub id.
        revision: the commit on the hub; None for a folder.
        folder: where the files are; None when only the headers were fetched from the hub.
        config: config.json as read.
        headers: name -> TensorHeader, in file order.
        dropped: names left out of `headers`: mask buffers of old checkpoints, and second names of a tensor.
        nbytes: size of all tensors in `headers`.
    """

    def __init__(
        self,
        source: str,
        revision: str | None,
        folder: Path | None,
        config: dict[str, Any],
        stored: Iterable[Stored],
        remote_sizes: Mapping[str, int] | None = None,
    ) -> None:
        kept, dropped = _drop_buffers_and_aliases(stored)
        self.source = source
        self.revision = revision
        self.folder = folder
        self.config = config
        self.headers: Mapping[str, TensorHeader] = MappingProxyType(
            {name: entry.header for name, entry in kept.items()}
        )
        self.dropped = tuple(dropped)
        self.nbytes = sum(header.nbytes for header in self.headers.values())
        self._stored = kept
        self._remote_sizes = remote_sizes or {}
        self._open_files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._maps.clear()  # each is unmapped with the last tensor that lies in it
        while self._open_files:
            self._open_files.popitem()[1].close()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, contiguous, in its stored type.

        Raises:
            CheckpointError: no such tensor, only the headers are here, or the file cannot be read.
        """
        header, path, place = self._find(name)
        if isinstance(place, torch.Tensor):
            return place.contiguous()
        with _reading(path):
            return _read_strided(self._open(path), header, place)

    def view(self, name: str) -> torch.Tensor:
        """One tensor as `read` gives it, but in the file's own memory where that can be: nothing is read before it is
        used, and nothing is copied. It outlives the checkpoint. The file must not be cut short meanwhile.

        Raises:
            CheckpointError: no such tensor, only the headers are here, or the file cannot be read.
        """
        header, path, place = self._find(name)
        if isinstance(place, torch.Tensor) or place.stride or place.begin % header.dtype.itemsize or not header.numel:
            return self.read(name)
        with _reading(path):
            if path not in self._maps:
                # Copy on write: torch wants memory that could be written, and the file is never changed by it.
                self._maps[path] = mmap.mmap(self._open(path).fileno(), 0, access=mmap.ACCESS_COPY)
            mapped = self._maps[path]
            if place.begin + header.nbytes > len(mapped):
                missing = place.begin + header.nbytes - len(mapped)
                raise CheckpointError(f"ends {missing} bytes before the end of tensor {header.name!r}")
            tensor = torch.frombuffer(mapped, dtype=header.dtype, count=header.numel, offset=place.begin)
            if hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED, *_pages(place.begin, place.begin + header.nbytes))
        return tensor.reshape(header.shape)

    def forget(self, name: str) -> None:
        """Give back the memory of a tensor that was viewed. It may still be used, and is then read once more."""
        header, path, place = self._find(name)
        if path in self._maps and isinstance(place, Span) and hasattr(mmap, "MADV_DONTNEED"):
            begin, length = _pages(place.begin, place.begin + header.nbytes)
            self._maps[path].madvise(mmap.MADV_DONTNEED, begin, length)

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        self._need_folder()
        return self._stored[name]

    def _open(self, path: Path) -> BinaryIO:
        if path not in self._open_files:
            self._open_files[path] = path.open("rb", buffering=0)
        return self._open_files[path]

    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({entry.file for entry in self._stored.values()})

    def companions(self) -> list[Path]:
        """The files that travel with the weights: tokenizer, generation defaults, license."""
        return companion_files(self._need_folder())

    def companion_sizes(self) -> dict[str, int]:
        """Name -> bytes of the files that travel with the weights, also where only headers were fetched."""
        if self.folder is not None:
            return {path.name: path.stat().st_size for path in self.companions()}
        found = self._remote_sizes.items()
        return {name: size for name, size in found if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)}

    def _need_folder(self) -> Path:
        if self.folder is None:
            raise CheckpointError(f"only the headers of {self.source} were fetched, not its files")
        return self.folder


def companion_files(folder: Path) -> list[Path]:
    """The files of a model folder that travel with its weights; none where there is no such folder."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def open_checkpoint(
    source: str | Path | None, *, revision: str | None = None, headers_only: bool = False, progress: Progress = SILENT
) -> Checkpoint:
    """Open a GPT-Neo in a folder or on the hub.

    Args:
        source: a folder; or, where no such folder exists, a hub id (`name` or `user/name`); None or "neoquant-demo" is
            the bundled model.
        revision: branch, tag or commit on the hub.
        headers_only: fetch some kilobytes of headers from the hub instead of the files.
        progress: told of downloads.

    Raises:
        CheckpointError: missing, damaged, or not a GPT-Neo (ConfigError).
        HubError: the hub does not have it or cannot be reached.
        RequestError: a revision of a folder.
    """
    source = demo.resolve(source)
    folder = _local(source, revision)
    if folder is not None:
        return _open_folder(str(source), folder, None)
    model = hub.find(str(source), revision)
    config = _read_config(model.folder)  # before gigabytes are fetched of something else than a GPT-Neo
    tensors = hub.fetch_headers(model) if headers_only else None
    if tensors is not None:
        stored = [Stored(header, Path(file), Span(begin, ())) for header, file, begin in tensors]
        return Checkpoint(str(source), model.commit, None, config, stored, model.sizes)
    hub.fetch_files(model, progress)
    return _open_folder(str(source), model.folder, model.commit)


def find_companions(source: str | Path | None, *, revision: str | None = None) -> Path:
    """A folder with what travels with a model's weights: a folder itself, or what is fetched from the hub without them.

    Raises what `open_checkpoint` does, but for what is wrong inside the folder.
    """
    source = demo.resolve(source)
    folder = _local(source, revision)
    if folder is not None:
        return folder
    model = hub.find(str(source), revision)
    hub.fetch_files(model, SILENT, weights=False)
    return model.folder


def _local(source: str | Path, revision: str | None) -> Path | None:
    """The folder that `source` names; None for an id on the hub. Raises CheckpointError for what is neither."""
    folder = Path(source)
    with _reading(folder):
        is_folder, exists = folder.is_dir(), folder.exists()
    if is_folder:
        if revision is not None:
            raise RequestError(f"{source} is a folder, and only models on the hub have revisions (got {revision!r})")
        return folder
    if exists:
        raise CheckpointError(f"{source} is a file, expected a model folder (perhaps {folder.parent})")
    if not hub.is_model_id(str(source)):
        raise CheckpointError(f"there is no folder {str(source)!r}, and it cannot be a model on the hub (`user/name`)")
    return None


def _open_folder(source: str, folder: Path, revision: str | None) -> Checkpoint:
    config = _read_config(folder)
    with _reading(folder):
        weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if weights is None:
            raise CheckpointError(f"holds no weights, expected one of {', '.join(WEIGHT_FILES)}")
    stored = _list_shards(weights) if weights.suffix == ".json" else _list_file(weights)
    return Checkpoint(source, revision, folder, config, stored)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    with _reading(folder):
        if not path.is_file():
            raise CheckpointError("holds no config.json, so it is not a model folder")
    with _reading(path):
        text = path.read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not JSON ({error})") from None
        if not isinstance(config, dict):
            raise ConfigError("not a JSON object")
        kind = config.get("model_type")
        if kind != "gpt_neo":
            raise ConfigError(f"model_type is {kind!r}, expected 'gpt_neo': only GPT-Neo is supported")
    return config


def _list_shards(index_file: Path) -> list[Stored]:
    """List the tensors of every shard that an index names, in the order of the shards' names."""
    with _reading(index_file):
        shard_of = _parse_index(index_file.read_text(encoding="utf-8"))
        shards = [index_file.parent / name for name in sorted(set(shard_of.values()))]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"names the shard {shard.name}, which is missing; download or copy it again")
    stored = [entry for shard in shards for entry in _list_file(shard)]
    seen: dict[str, Path] = {}
    for header, file, _ in stored:
        if header.name in seen:
            raise CheckpointError(f"{file}: tensor {header.name!r} is also in {seen[header.name].name}")
        seen[header.name] = file
        if shard_of.get(header.name) != file.name:
            listed = shard_of.get(header.name, "no shard")
            raise CheckpointError(f"{file}: holds tensor {header.name!r}, which {index_file.name} puts in {listed}")
    for name, shard_name in shard_of.items():
        if name not in seen:
            raise CheckpointError(
                f"{index_file.parent / shard_name}: lacks tensor {name!r} that {index_file.name} promises"
            )
    return stored


def _parse_index(text: str) -> dict[str, str]:
    try:
        shard_of = json.loads(text)["weight_map"]
        legal = all(isinstance(shard, str) and shard == Path(shard).name for shard in shard_of.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        legal = False
    if not legal or not shard_of:
        raise CheckpointError("not an index: expected a JSON object whose `weight_map` gives each tensor's file here")
    return dict(shard_of)


def _list_file(path: Path) -> list[Stored]:
    with _reading(path):
        if path.suffix == ".safetensors":
            return [Stored(header, path, Span(begin, ())) for header, begin in _read_header(path)]
        return [Stored(header, path, place) for header, place in torch_file.list_tensors(path)]


def _read_header(path: Path) -> list[tuple[TensorHeader, int]]:
    """List a safetensors file's tensors and the positions of their first bytes in the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise CheckpointError(
                f"truncated, or not a safetensors file: {size} bytes, but the header alone should end at {8 + length}"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are legal")
        text = file.read(length)
    return [(header, 8 + length + begin) for header, begin in parse_header(text, size - 8 - length)]


def _read_strided(file: BinaryIO, header: TensorHeader, span: Span) -> torch.Tensor:
    """Read the bytes from a tensor's first element to its last, and nothing else of the file."""
    if header.numel == 0:
        return torch.empty(header.shape, dtype=header.dtype)
    elements = header.numel
    if span.stride:
        elements = 1 + sum((n - 1) * step for n, step in zip(header.shape, span.stride, strict=True))
    buffer = torch.empty(elements * header.dtype.itemsize, dtype=torch.uint8)
    view = buffer.numpy().data
    file.seek(span.begin)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # an unbuffered file; one call reads 2 GiB at most
        if not count:
            raise CheckpointError(f"ends {len(view)} bytes before the end of tensor {header.name!r}")
        view = view[count:]
    tensor = buffer.view(header.dtype)
    if span.stride:
        return tensor.as_strided(header.shape, span.stride).contiguous()
    return tensor.reshape(header.shape)


def _pages(begin: int, end: int) -> tuple[int, int]:
    """Where the pages begin that hold bytes [begin, end) of a file, and how long they are together."""
    first = begin - begin % mmap.PAGESIZE
    return first, end - first


def _drop_buffers_and_aliases(stored: Iterable[Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Leave out mask buffers, and every name but the first of tensors that share their memory (a tied lm_head)."""
    kept: dict[str, Stored] = {}
    dropped: list[str] = []
    places = set()
    for entry in stored:
        header, file, place = entry
        where = (place.data_ptr(), place.stride()) if isinstance(place, torch.Tensor) else place
        identity = (file, header.dtype, header.shape, where)
        alias = header.numel > 0 and identity in places  # tensors without elements may share a place by chance
        if alias or is_mask_buffer(header.name):
            dropped.append(header.name)
        else:
            kept[header.name] = entry
            places.add(identity)
    return kept, dropped


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Put the path in front of every error, and turn the system's errors into ours."""
    with locate(str(path)):
        try:
            yield
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
