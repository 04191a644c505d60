"""What `eval` and `compare` share: which text, and which models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neoquant.cli.describe import calibrated_on, model_info
from neoquant.cli.models import BUNDLED, find_model, short_name, suite_for
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from neoquant.evaluation import Contestant, Suite
    from neoquant.model.tokenizer import Tokenizer


def choose_suite(
    name: str | None,
    model: str | None,
    *,
    data: str | None,
    subset: list[str] | None,
    documents: int | None,
    protocol: str | None,
    context: int | None,
    stride: int | None,
) -> Suite:
    """The suite that the options describe: the named one, or the data alone, or the bundled model's own, `demo`.

    Raises:
        RequestError: there is neither a suite nor data, there is none of that name, or the values do not fit together.
        DataError: the file is not a suite.
    """
    from neoquant.evaluation import Suite, load_suite, suite_names

    overrides: dict[str, Any] = {"documents": documents, "protocol": protocol, "context": context, "stride": stride}
    overrides["subsets"] = tuple(subset) if subset else None
    if name is None and data is not None:
        return Suite.of_file(data).override(**overrides)
    if name is None and model in (None, BUNDLED):
        name = suite_for(model)
    if name is None:
        raise RequestError(
            f"say what to evaluate on: --suite with one of {', '.join(suite_names())}, or a TOML file; or --data with "
            "a .jsonl, .jsonl.zst or .txt file"
        )
    return load_suite(name).override(file=data, **overrides)


def load_contestant(
    model: str | None,
    terminal: Terminal,
    verb: str,
    *,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    activations: str = "exact",
) -> tuple[Contestant, Tokenizer]:
    """A model ready to run, what results say of it, and its tokenizer."""
    from neoquant import loading
    from neoquant.evaluation import Contestant

    source = find_model(model, terminal, verb)
    info = model_info(source, revision, short_name(model), terminal.progress)
    network, tokenizer = loading.load(
        source,
        revision=info.revision,
        device=device,
        dtype=dtype,
        activations=activations,
        progress=terminal.progress,
    )
    if activations != "exact":
        info = info.model_copy(update={"name": f"{info.name} ({activations} activations)", "activations": activations})
    return Contestant(network, info, calibrated_on(source, info.revision, terminal.progress)), tokenizer
