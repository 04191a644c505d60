"""Models on the Hugging Face hub: which files, at which commit, and what to do when they cannot be had.

huggingface_hub is imported when first needed: it takes a while, and folders do not need it. It honours HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, cast

from neoquant.checkpoint.foreign import explain_folder
from neoquant.checkpoint.headers import DTYPES, TensorHeader
from neoquant.checkpoint.weight_files import CONFIG, GPTQ_CONFIG, choose_weight_files
from neoquant.errors import CheckpointError, HubError, locate
from neoquant.progress import SILENT, Progress

_MODEL_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)

# What says which model it is: fetched before anything else.
_DESCRIPTIONS = (CONFIG, GPTQ_CONFIG)
# Beside the weights: configuration, tokenizer, license. All of them are small.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


class HubModel(NamedTuple):
    """A model found on the hub, of which nothing but config.json has been fetched; or in the cache, when offline."""

    source: str
    commit: str
    folder: Path
    sizes: dict[str, int] | None
    """Files in its uppermost folder and their bytes; None when offline."""


def is_model_id(source: str) -> bool:
    """Whether `source` has the form `name` or `user/name`."""
    return _MODEL_ID.fullmatch(source) is not None


def find(source: str, revision: str | None) -> HubModel:
    """Look a model up and fetch its config.json.

    Raises:
        HubError: it does not exist, must not be read, cannot be reached, or holds no weights that can be read.
    """
    from huggingface_hub import constants

    with _explained(source, revision):
        if constants.HF_HUB_OFFLINE:
            folder = _cached(source, revision)
            return HubModel(source, folder.name, folder, None)
        commit, sizes = _list_files(source, revision)
        _weights_among(sizes, source)
        if CONFIG not in sizes:
            raise HubError(f"{source} holds no {CONFIG}, so it is not a model that can be read")
        described_by = {name: sizes[name] for name in _DESCRIPTIONS if name in sizes}
        folder = _download(source, revision, described_by, SILENT)
        return HubModel(source, commit, folder, sizes)


def fetch_headers(model: HubModel) -> list[tuple[TensorHeader, str, int]] | None:
    """Fetch the headers of the weights, some kilobytes: each tensor with its file and its place there.

    Returns: None where the files themselves are needed: offline, or because they are not safetensors.

    Raises:
        HubError: the hub cannot be reached.
        CheckpointError: what it holds is damaged.
    """
    if model.sizes is None:
        return None
    files = _weights_among(model.sizes, model.source)
    if not all(file.endswith(".safetensors") for file in files):
        return None
    with _explained(model.source, model.commit):
        return [(header, file, begin) for file in files for header, begin in _fetch_header(model, file)]


def fetch_files(model: HubModel, progress: Progress, *, weights: bool = True) -> None:
    """Bring what `model.folder` lacks into it: one kind of `weights`, and what travels with them.

    Raises:
        HubError: the hub cannot be reached, or the disk has no room.
    """
    if model.sizes is None:
        return
    large = _weights_among(model.sizes, model.source) if weights else []
    small = [name for name in model.sizes if any(fnmatch(name, pattern) for pattern in _SMALL_FILES)]
    missing = {name: model.sizes[name] for name in (*small, *large) if not (model.folder / name).exists()}
    if missing:
        with _explained(model.source, model.commit):
            _download(model.source, model.commit, missing, progress)


def _fetch_header(model: HubModel, file: str) -> list[tuple[TensorHeader, int]]:
    """The tensors of a safetensors file on the hub and their places, in file order."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        found = HfApi().parse_safetensors_file_metadata(model.source, file, revision=model.commit).tensors
    except SafetensorsParsingError as error:
        raise CheckpointError(
            f"{model.source}/{file}: the header cannot be read, so the file on the hub is damaged"
        ) from error
    unknown = [f"{name!r} has the dtype {info.dtype!r}" for name, info in found.items() if info.dtype not in DTYPES]
    if unknown:
        raise CheckpointError(f"{model.source}/{file}: tensor {unknown[0]}; known are {', '.join(DTYPES)}")
    in_order = sorted(found.items(), key=lambda entry: entry[1].data_offsets)
    return [(TensorHeader(name, DTYPES[t.dtype], tuple(t.shape)), t.data_offsets[0]) for name, t in in_order]


def _list_files(source: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """The commit that a revision is at, and the names and sizes of the files in its uppermost folder."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(source, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return info.sha or "", {name: size for name, size in files.items() if "/" not in name}


def _weights_among(names: Iterable[str], where: str) -> list[str]:
    """The files that hold the weights, an index left out."""
    names = list(names)
    with locate(where):
        files = choose_weight_files(names)
    if files is None:
        raise HubError(f"{where} {explain_folder(names)}")
    return list(files.files)


def _cached(source: str, revision: str | None) -> Path:
    """The folder of a model that was downloaded before."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(source, CONFIG, revision=revision)
    if not isinstance(config, str):
        which = source if revision is None else f"{source} at revision {revision}"
        raise HubError(
            f"there is no folder {source} here, and HF_HUB_OFFLINE is set while {which} is not in the cache "
            f"({constants.HF_HUB_CACHE}); unset it to download"
        )
    folder = Path(config).parent
    _weights_among((path.name for path in folder.iterdir()), f"the copy of {source} in the cache ({folder})")
    return folder


def _download(source: str, revision: str | None, sizes: dict[str, int], progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    with progress.task(f"downloading {source}", total=sum(sizes.values())) as advance:
        bars = _silent_bars(advance)
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(sizes), tqdm_class=bars))


def _silent_bars(advance: Callable[[float], None]) -> type[Any]:
    """A class of progress bars that huggingface_hub may create at will: one counts the bytes, the others are mute."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                advance(n or 0)

    return Bar


def transport_errors() -> tuple[type[Exception], ...]:
    """What a hub that cannot be reached, or refuses, raises."""
    from huggingface_hub import errors

    # HfHubHTTPError inherits from the root of whatever HTTP library this version of huggingface_hub uses, and OSError.
    return cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)


@contextmanager
def _explained(source: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError:
        raise HubError(f"{source!r} cannot be the name of a model on the hub, and there is no such folder") from None
    except errors.GatedRepoError as error:
        raise HubError(
            f"{source} is gated: accept its terms at {constants.ENDPOINT}/{source}, then set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no model {source} on the hub, and no folder of that name here; "
            "check the name (a private model needs HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{source} has no revision {revision!r}, expected a branch, tag or commit") from error
    except transport_errors() as error:
        raise HubError(_transport_problem(source, error)) from error
    except UnicodeEncodeError as error:
        raise no_token() from error
    except (ValueError, KeyError, TypeError) as error:  # JSON that is none, or another's
        raise not_the_hub(source) from error


def no_token() -> HubError:
    """What is sent as a token cannot be one: nothing else that is sent may hold more than ASCII."""
    return HubError("the token (HF_TOKEN, or what `hf auth login` saved) is none of the hub's: it is not ASCII")


def not_the_hub(source: str) -> HubError:
    """Something else answers in the hub's place."""
    from huggingface_hub import constants

    return HubError(
        f"what answers at {constants.ENDPOINT} is not the hub (a login page of the network, or a proxy?): "
        f"its answer about {source} cannot be read"
    )


def _transport_problem(source: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"cannot store {source} in {constants.HF_HUB_CACHE} ({error}); set HF_HOME to a folder with room"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"the hub at {constants.ENDPOINT} answered {error.response.status_code} for {source}; try again later"
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return (
        f"there is no folder {source} here, and the hub at {constants.ENDPOINT} cannot be reached ({reason[0]}); "
        "check the name and the network, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )
