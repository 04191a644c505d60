"""Hidden states of calibration rows on their way through a model, in memory or in files: the same values either way.

Files are read and written piece by piece, never mapped: pages of a map would count against the process.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from neoquant.errors import OutputError
from neoquant.model.transfers import on_host, to_device
from neoquant.sizes import plural

CPU = torch.device("cpu")
TOKENS = 4096  # of a piece, about: large enough for whole matrix products, small beside a block
SCRATCH = "scratch-"  # how names of files begin that nobody needs once their process is gone


class HiddenStates(ABC):
    """float32[R, T, C], dealt with in batches of `batch` rows, which lie on `device`."""

    def __init__(self, shape: tuple[int, int, int], batch: int, device: torch.device = CPU) -> None:
        self.shape, self.batch, self.device = shape, batch, device

    def __len__(self) -> int:
        """Rows."""
        return self.shape[0]

    @abstractmethod
    def batches(self) -> Iterator[Tensor]:
        """float32[batch, T, C], the last perhaps shorter. They may be changed, but only `replace` makes it last."""

    @abstractmethod
    def replace(self, batches: Iterable[Tensor]) -> None:
        """Take other values, piece by piece, which may be made of the old ones on the way."""

    @abstractmethod
    def empty_like(self) -> HiddenStates:
        """Another of the same shape in the same kind of place, without values yet."""

    @abstractmethod
    def save(self, path: Path) -> str:
        """Have the values in a file `path`, safe on the disk, and return its SHA-256."""

    def to_tensor(self) -> Tensor:
        """All at once."""
        return torch.cat(list(self.batches()))

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held; the values are gone."""

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for content in _contents(self.batches()):
            digest.update(content)
        return digest.hexdigest()


class HiddenStatesInMemory(HiddenStates):
    """Pieces in a list."""

    def __init__(self, shape: tuple[int, int, int], batch: int, device: torch.device = CPU) -> None:
        super().__init__(shape, batch, device)
        self._pieces: list[Tensor] = []

    @classmethod
    def of(cls, x: Tensor, tokens: int = TOKENS) -> HiddenStatesInMemory:
        """`x`[R, T, C] itself, which will be changed."""
        states = cls((x.shape[0], x.shape[1], x.shape[2]), rows_of_batch(x.shape[1], tokens))
        states._pieces = list(torch.split(x, states.batch))
        return states

    def batches(self) -> Iterator[Tensor]:
        return iter(self._pieces)

    def replace(self, batches: Iterable[Tensor]) -> None:
        for number, piece in enumerate(batches):
            self._pieces[number : number + 1] = [to_device(piece, self.device)]

    def empty_like(self) -> HiddenStates:
        return HiddenStatesInMemory(self.shape, self.batch, self.device)

    def save(self, path: Path) -> str:
        digest = hashlib.sha256()
        with writing(path), path.open("wb") as file:
            for content in _contents(self._pieces):
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def close(self) -> None:
        self._pieces.clear()


class HiddenStatesOnDisk(HiddenStates):
    """A file in `folder`, or one that is there already: `path`, which must be as long as `shape` says."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        batch: int,
        folder: Path,
        path: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(shape, batch, device)
        self.folder = folder
        self._scratch: Path | None = None  # the file, while it is nobody else's
        self._file = -1 if path is None else os.open(path, os.O_RDONLY)

    def batches(self) -> Iterator[Tensor]:
        rows, T, C = self.shape
        for start in range(0, rows, self.batch):
            piece = torch.empty(min(self.batch, rows - start), T, C)
            view, place = _bytes_of(piece), start * T * C * 4
            while view:
                count = os.preadv(self._file, [view], place)
                if not count:
                    raise OutputError(f"{self.folder}: hidden states end {plural(len(view), 'byte')} too early")
                view, place = view[count:], place + count
            yield to_device(piece, self.device)

    def replace(self, batches: Iterable[Tensor]) -> None:
        other = HiddenStatesOnDisk(self.shape, self.batch, self.folder, device=self.device)
        with writing(self.folder):
            other._file, name = tempfile.mkstemp(prefix=SCRATCH, dir=self.folder)
            other._scratch = Path(name)
            try:
                with os.fdopen(os.dup(other._file), "wb") as file:
                    for content in _contents(batches):
                        file.write(content)
            except BaseException:
                other.close()
                raise
        self.close()
        self._file, self._scratch = other._file, other._scratch

    def empty_like(self) -> HiddenStates:
        return HiddenStatesOnDisk(self.shape, self.batch, self.folder, device=self.device)

    def save(self, path: Path) -> str:
        assert self._scratch is not None
        digest = self._digest()
        with writing(path):
            os.fsync(self._file)
            self._scratch.rename(path)
        self._scratch = None
        return digest

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._scratch is not None:
            self._scratch.unlink(missing_ok=True)
            self._scratch = None


def rows_of_batch(length: int, tokens: int = TOKENS) -> int:
    """Rows of `length` that make a piece of about so many tokens."""
    return max(1, tokens // length)


def read_hidden_states(
    path: Path, shape: tuple[int, int, int], digest: str, spilled: bool, device: torch.device = CPU
) -> HiddenStates | None:
    """What `save` left in a file, or None if it is not that any more."""
    expected = 4 * shape[0] * shape[1] * shape[2]
    if path.stat().st_size != expected:
        return None
    found = HiddenStatesOnDisk(shape, rows_of_batch(shape[1]), path.parent, path, device)
    if not found._digest().startswith(digest):
        found.close()
        return None
    if spilled:
        return found
    loaded = HiddenStatesInMemory(shape, found.batch, device)
    loaded.replace(found.batches())
    found.close()
    return loaded


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _contents(pieces: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of each piece; of a GPU's while the next piece is made there."""
    return (_bytes_of(piece) for (piece,) in on_host((piece,) for piece in pieces))


def _bytes_of(piece: Tensor) -> memoryview:
    return piece.contiguous().view(-1).view(torch.uint8).numpy().data
