"""Send a model folder to the Hugging Face hub, in one commit: what is there is the old model or the new one.

huggingface_hub is imported when first needed. It honours HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from neoquant import demo
from neoquant.checkpoint import hub
from neoquant.checkpoint.folder import files_of
from neoquant.checkpoint.reader import Checkpoint, open_checkpoint
from neoquant.checkpoint.weight_files import CONFIG, GPTQ_CONFIG, may_be_weights
from neoquant.errors import CheckpointError, HubError, RequestError
from neoquant.files.reading import MAX_LARGE_BYTES, read_text
from neoquant.progress import SILENT, Progress
from neoquant.sizes import size

CARD = "README.md"
GATED = ("auto", "manual")

# Where transformers found a model or a tokenizer; an id on the hub is nobody's secret.
_ABSOLUTE = re.compile(
    r'"(_?name_or_path|tokenizer_file|vocab_file|merges_file)"\s*:\s*("(?:[/~]|[A-Za-z]:\\\\)[^"]*")'
)
_DESCRIBING = (CONFIG, GPTQ_CONFIG, "neoquant.json", "calibration.json", "tokenizer_config.json")
_BESIDE = (CONFIG, GPTQ_CONFIG, CARD, "neoquant.json", "calibration.json")


@dataclass(frozen=True)
class Push:
    """What is sent, or would be: file -> bytes. `left_out` are files of the folder that are no part of a model,
    `removed` old weight files on the hub, and what describes them, that the new ones take the place of."""

    folder: Path
    repo: str
    revision: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    removed: tuple[str, ...] = ()
    commit: str | None = None
    url: str | None = None
    """None of a dry run."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {
            "folder": str(self.folder),
            "repo": self.repo,
            "revision": self.revision,
            "files": dict(self.files),
            "left_out": list(self.left_out),
            "removed": list(self.removed),
            "commit": self.commit,
            "url": self.url,
        }


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    gated: str | None = None,
    revision: str = "main",
    message: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Push:
    """Send the model in `folder` to `repo` ("user/name"), which is made if it is not there.

    Args:
        folder: a whole model folder, with its card README.md. Of its files, the weights, configuration, tokenizer,
            licence, card and neoquant's records are sent; others are left out, and named.
        repo: on the hub; HF_TOKEN, or a token that was stored before, must be allowed to write there.
        private: make it private; a public one that is there already is refused, not published to.
        gated: "auto" or "manual": people must ask for access, and get it at once or by hand.
        revision: the branch, made from main if it is not there.
        message: of the commit.
        dry_run: send nothing, ask nobody; say what would be sent.
        token: in place of HF_TOKEN, or the stored one.
        progress: told of the sending.

    Raises:
        CheckpointError: the folder is no whole model, or has no card.
        RequestError: an illegal name or option.
        HubError: offline, no token, not allowed, refused, or not to be reached.
    """
    require_repo(repo)
    if gated is not None and gated not in GATED:
        raise RequestError(f"gated is {gated!r}; legal are {' and '.join(GATED)}")
    planned = _plan(Path(demo.resolve(folder)), repo, revision)
    return planned if dry_run else _send(planned, _Terms(private, gated, message, token), progress)


def push_files(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Push:
    """Send all files of a folder that was just made, as `push` does; a card only where the hub has none.

    Raises RequestError and HubError.
    """
    require_repo(repo)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return _send(Push(folder, repo, revision, files, ()), _Terms(private, None, message, token, (CARD,)), progress)


def require_repo(repo: str) -> None:
    """Raise RequestError for what cannot be somebody's model on the hub."""
    if not hub.is_model_id(repo) or "/" not in repo:
        raise RequestError(f"{repo!r} is no name on the hub: expected user/name")


class _Terms(NamedTuple):
    """How it is sent: `push`'s arguments, and files that are sent only where the hub has none of that name."""

    private: bool
    gated: str | None
    message: str | None
    token: str | None
    unless_there: tuple[str, ...] = ()


def _plan(folder: Path, repo: str, revision: str) -> Push:
    """What is to be sent, of a folder that is read as far as its headers."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}")
    with open_checkpoint(folder) as checkpoint:
        needed = _needed(checkpoint)
    if not (folder / CARD).is_file():
        raise CheckpointError(
            f"{folder} holds no {CARD}, the model card, and nobody would know what it is: "
            "`neoquant quantize` and `neoquant convert` write one"
        )
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name in needed:
            _require_inside(folder / name)
    for name in (CARD, *_DESCRIBING):
        if (folder / name).is_file():
            _require_no_local_paths(folder / name)
    sizes = {name: (folder / name).stat().st_size for name in names if name in needed}
    return Push(folder, repo, revision, sizes, tuple(name for name in names if name not in needed))


def _require_inside(path: Path) -> None:
    """Refuse a link to what is not the folder's: anything of this machine could be published under a model's name."""
    inside = path.parent.resolve()
    if inside.parent.name == "snapshots":  # the hub's cache, whose files are links to its blobs
        inside = inside.parent.parent
    if not path.resolve().is_relative_to(inside):
        raise CheckpointError(f"{path} is a link to {path.resolve()}, outside the folder: put the file itself there")


def _require_no_local_paths(path: Path) -> None:
    """Refuse a card, or a file that describes the model, which tells where things lie on this machine."""
    text = read_text(path, limit=MAX_LARGE_BYTES)
    for place in (path.parent.resolve().parent, Path.cwd(), Path.home()):
        if len(place.parts) > 2 and f"{place}/" in text:
            raise CheckpointError(f"{path} names {place}, a path on this machine: take it out")
    if path.name != CARD and (found := _ABSOLUTE.search(text)):
        raise CheckpointError(f"{path} says {found[1]} is {found[2]}, a path on a machine: take it out")


def _needed(checkpoint: Checkpoint) -> set[str]:
    """The names of the files that are the model's: weights in use, and what describes them and travels with them."""
    assert checkpoint.folder is not None
    index = files_of(checkpoint.folder).index_file
    used = {path.name for path in (*checkpoint.weight_files(), *checkpoint.companions())}
    return used | set(_BESIDE) | ({index} if index else set())


def _send(planned: Push, terms: _Terms, progress: Progress) -> Push:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    repo, revision = planned.repo, planned.revision
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set, so nothing can be sent to {repo}; unset it")
    if terms.token is None and get_token() is None:
        raise HubError(
            f"no token: set HF_TOKEN to one that may write to {repo} (from {constants.ENDPOINT}/settings/tokens)"
        )
    api = HfApi(token=terms.token)
    with _explained(repo), _quietly():
        try:
            there = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=terms.private or None, repo_type="model")
            there = None
        if there is not None and terms.private and not there.private:
            raise HubError(f"{repo} is there already, and public: make it private on the hub, or name another")
        if terms.gated is not None:
            api.update_repo_settings(repo, gated=cast("Any", terms.gated))
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        held = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or []}
        files = {
            name: size for name, size in planned.files.items() if name not in held or name not in terms.unless_there
        }
        stale = tuple(sorted(name for name in held - files.keys() if _describes_weights(name)))
        stale = stale if any(map(may_be_weights, files)) else ()
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, planned.folder / name) for name in files]
        message = terms.message or f"Upload {planned.folder.resolve().name}"
        with progress.task(f"sending {size(sum(files.values()))} to {repo}", total=None):
            done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    return replace(planned, files=files, removed=stale, commit=done.oid, url=done.commit_url)


def _describes_weights(name: str) -> bool:
    """Whether a reader might take a file for the model's weights, or read from it how they are quantized."""
    return "/" not in name and (may_be_weights(name) or name == GPTQ_CONFIG)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's own bars and warnings."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    # The last is what the hub's own storage library raises.
    unreachable: tuple[type[BaseException], ...] = (*hub.transport_errors(), RuntimeError)
    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise hub.not_the_hub(repo) from error
    except UnicodeEncodeError as error:
        raise hub.no_token() from error
    except (errors.HFValidationError, ValueError) as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise HubError(_refusal(repo, error)) from error
        raise HubError(f"{repo}: {' '.join(str(error).split())}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo, error)) from error
    except unreachable as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(
            f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); nothing was published"
        ) from error


def _refusal(repo: str, error: Any) -> str:
    """What a hub's refusal means."""
    from huggingface_hub import constants

    status = error.response.status_code if error.response is not None else None
    message = " ".join((error.server_message or "").split())
    because = f" ({message})" if message else ""
    if status == 401:
        return f"the hub at {constants.ENDPOINT} does not know the token{because}: set HF_TOKEN to a valid one"
    if status in (403, 404):
        return f"the token may not write to {repo}{because}: check the name, and that the token may write"
    return f"the hub at {constants.ENDPOINT} answered {status} for {repo}{because}; nothing was published"
