"""Everything neoquant raises on purpose.

    NeoquantError                 exit code 1: the work could not be done
    ├── CheckpointError           a model folder or one of its files is missing, damaged or not what it says
    │   ├── ShapeError            a tensor has another shape than config.json says (also a RuntimeError)
    │   └── ConfigError           config.json describes something that is not a legal GPT-Neo
    ├── FormatError               tensors that do not spell a quantized weight
    ├── DataError                 a suite, document file or data set that cannot be read as one
    ├── HubError                  the model or data hub cannot be reached, or does not have it
    ├── OutputError               the result cannot be written: it exists, or the disk is full
    ├── ContextError              more positions than the model has
    ├── LostProcessError          one of the processes that share a piece of work has ended
    └── RequestError              exit code 2: the request itself is not legal (also a ValueError)
        └── RecipeError           a recipe that cannot be carried out

Every message names the thing, the value that was found and what would have been legal. `locate` adds where it
happened while the error climbs, so that the code that finds the fault needs to know only its own names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class NeoquantError(Exception):
    """The root: catch this to catch everything neoquant raises on purpose.

    `str(error)` is one line: `place: place: message`.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.places: list[str] = []

    def __str__(self) -> str:
        text = self.message
        for place in self.places:
            text = _behind(place, text)
        return text


def _behind(place: str, text: str) -> str:
    """`place: text`, or `text` where it begins with the place: whoever raised it may know the file, too."""
    for name in (place, place.rpartition("/")[2]):
        if name and text.startswith((f"{name}:", f"{name} ")):
            return place + text[len(name) :]
    return f"{place}: {text}"


class CheckpointError(NeoquantError):
    """A model folder or one of its files is missing, damaged or not what it says it is."""


class ShapeError(CheckpointError, RuntimeError):
    """A tensor has another shape than the model's. It is a RuntimeError, too, as transformers raises for it."""


class ConfigError(CheckpointError):
    """`config.json` does not describe a legal GPT-Neo."""


class FormatError(NeoquantError):
    """Stored tensors do not spell a quantized weight, or a quantized weight cannot be spelled in a format."""


class DataError(NeoquantError):
    """A suite, a document file or a data set cannot be read."""


class HubError(NeoquantError):
    """The hub cannot be reached, refuses, or does not have what was asked for."""


class OutputError(NeoquantError):
    """The result cannot be written."""


class ContextError(NeoquantError):
    """More positions than the model has embeddings for."""


class LostProcessError(NeoquantError):
    """One of the processes that share a piece of work has ended, or cannot be reached."""


class RequestError(NeoquantError, ValueError):
    """What was asked for is not legal, whatever the files hold.

    It is a ValueError, too, which programs for transformers expect where an argument is not legal.
    """

    exit_code = 2


class RecipeError(RequestError):
    """A recipe holds an unknown key, an illegal value, or a rule that cannot be carried out."""


@contextmanager
def locate(place: str) -> Iterator[None]:
    """Put `place` (a tensor, a file, a recipe line) in front of any NeoquantError raised inside."""
    try:
        yield
    except NeoquantError as error:
        error.places.append(place)
        raise
