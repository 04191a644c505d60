"""What may be asked of `generate`, in transformers' words, and what a model's folder asks for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from neoquant.errors import ConfigError, RequestError, locate
from neoquant.files.reading import read_json
from neoquant.generation.generate import Sampling
from neoquant.generation.words import ON_THE_HUB, ONLY, WITHOUT_EFFECT, fault
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import CausalLM
from neoquant.sizes import plural

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20  # transformers' own


class OnlyInTransformersError(RequestError):
    """What is asked for is not done here, but by transformers, on the same tensors."""


@dataclass
class GenerationConfig:
    """How a text is continued; None leaves it to the default, which is transformers'.

    `max_length` and `min_length` count the prompt, `max_new_tokens` and `min_new_tokens` do not and have precedence;
    without either maximum, 20 new tokens.
    `do_sample=False` takes the likeliest token; `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
    `no_repeat_ngram_size`, `bad_words_ids`, `suppress_tokens` and `seed` are `Sampling`'s. `num_return_sequences` rows
    come of each prompt. Rows end at `eos_token_id` and are filled up with `pad_token_id`; they also end behind one of
    `stop_strings`. Without a prompt, a text begins with `bos_token_id`.
    `cache_dtype` is what keys and values are held in: "float32", "float16", "int8", or None, as they come.
    `cache_implementation="static"` holds them in buffers of fixed size, so that a GPU replays each new token's work as
    one CUDA graph; nothing else that transformers takes there changes anything.
    With `prompt_lookup_num_tokens` above 0, so many tokens at most are guessed from what followed where the text ended
    likewise before, and checked together. With `return_dict_in_generate`, a `GenerateDecoderOnlyOutput` is returned,
    with each token's scores or logits where `output_scores` or `output_logits` say so.

    Every setting may be changed; what only transformers does is refused when something is generated. Raises
    RequestError for an illegal value, or a setting that there is not.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    seed: int | None = None
    cache_dtype: str | None = None
    cache_implementation: str | None = None
    prompt_lookup_num_tokens: int | None = None
    min_p: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: int | Sequence[int] | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    others: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """transformers' other words that were stated; `require_possible` refuses what neoquant does not do."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ONLY:
            kept = {other: held for other, held in self.others.items() if other != name}
            name, value = "others", kept if value is None else {**kept, name: value}
        elif name not in (*_NAMES, *WITHOUT_EFFECT, "others"):
            raise RequestError(f"generating has no setting {name!r}; {_hint(name)}")
        if value is not None and (reason := fault(name, value)):
            raise RequestError(reason)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in WITHOUT_EFFECT or name in ONLY:
            return self.others.get(name)
        raise AttributeError(f"generating has no setting {name!r}; {_hint(name)}")

    @classmethod
    def of(cls, stated: Any) -> GenerationConfig:
        """From our own class, transformers', or plain values. Raises RequestError for what `generate` does not do."""
        if isinstance(stated, cls):
            return stated
        values = stated if isinstance(stated, Mapping) else stated.to_diff_dict()
        config, unknown = cls._read(values)
        if unknown:
            raise RequestError("; ".join(f"generate does not know {name!r}; {_hint(name)}" for name in unknown))
        config.require_possible()
        return config

    @classmethod
    def of_model(cls, model: CausalLM) -> GenerationConfig:
        """What a model was loaded with, or else what its configuration says."""
        own = getattr(model, "generation_config", None)
        return own if isinstance(own, cls) else cls.from_model_config(model.config)

    @classmethod
    def from_model_config(cls, config: GPTNeoConfig) -> GenerationConfig:
        """Transformers' words for generating among a model configuration's, where older versions wrote them.

        Raises ConfigError for an illegal value.
        """
        values = {name: value for name, value in config.extra.items() if name in _WORDS}
        values |= {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        with _as_config_error():
            return cls._read(values)[0]

    @classmethod
    def from_folder(cls, folder: Path, config: GPTNeoConfig) -> tuple[GenerationConfig, list[str]]:
        """What the folder's generation_config.json asks for, and names in it that are no words for generating.

        Where there is no such file, `config`, the folder's config.json, says it. Raises ConfigError for a file that is
        no JSON object, and for illegal values.
        """
        path = folder / FILE
        if not path.is_file():
            return cls.from_model_config(config), []
        values = read_json(path, error=ConfigError)
        with _as_config_error(), locate(str(path)):
            if not isinstance(values, dict):
                raise ConfigError(f"holds JSON of type {type(values).__name__}, not an object")
            return cls._read(values)

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
        """And the names that nobody knows. A leading underscore marks what is only for transformers itself."""
        stated = {name: value for name, value in values.items() if value is not None and not name.startswith("_")}
        ours = {name: value for name, value in stated.items() if name in _NAMES}
        others = {name: value for name, value in stated.items() if name in ONLY}
        unknown = [name for name in stated if name not in (*_NAMES, *ONLY, *WITHOUT_EFFECT)]
        return cls(**ours, others=others), unknown

    def but(self, other: GenerationConfig) -> GenerationConfig:
        """This, except for what the other one states."""
        stated = {name: value for name, value in other.to_dict().items() if name in _NAMES}
        return replace(self, **stated, others={**self.others, **other.others})

    def unset(self, names: Iterable[str]) -> GenerationConfig:
        """This without what it states of these: not even transformers' defaults hold, so that all tokens are kept."""
        names = list(names)
        ours: dict[str, Any] = {name: 0 if name == "top_k" else None for name in names if name in _NAMES}
        return replace(self, **ours, others={name: value for name, value in self.others.items() if name not in names})

    def require_possible(self) -> None:
        """Raise RequestError for what neoquant does not do: OnlyInTransformersError if transformers does it by itself,
        without code from the hub."""
        faults, repositories = [], []
        for name, value in self.others.items():
            only = ONLY[name]
            if reason := fault(name, value):
                raise RequestError(reason)
            if value not in only:
                instead = " or ".join(map(repr, only)) or "None"
                given = f"a {type(value).__name__}" if isinstance(value, Tensor) else f"{value!r:.80}"
                faults.append(f"{name} is {given}; neoquant generates with {instead} only")
                repositories += [ON_THE_HUB[name]] if name in ON_THE_HUB else []
        if repositories and self.others.get("custom_generate") is None:
            way = f"model.to_transformers().generate runs custom_generate={repositories[0]!r}, code of the hub, for it"
            raise RequestError("; ".join(faults) + f" (in Python, {way})")
        if faults:
            raise OnlyInTransformersError("; ".join(faults) + " (in Python, model.to_transformers().generate takes it)")

    def to_dict(self) -> dict[str, Any]:
        """What is stated."""
        values = ((name, getattr(self, name)) for name in _NAMES)
        return {name: value for name, value in values if value is not None} | dict(self.others)

    def new_tokens(self, prompt: int, context: int, default: int = DEFAULT_NEW_TOKENS) -> int:
        """How many may follow a prompt of that many tokens; `default`, or what the context leaves, if none is stated.

        Raises RequestError where `max_length` leaves no room.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(1, min(default, context - prompt))
        if self.max_length <= prompt:
            raise RequestError(
                f"max_length is {self.max_length}, and the prompt alone has {plural(prompt, 'token')}: raise it, or "
                "say max_new_tokens, which does not count the prompt"
            )
        return self.max_length - prompt

    @property
    def static_cache(self) -> bool:
        """Whether keys and values are to be held in buffers of fixed size."""
        return self.cache_implementation == "static"

    def copies(self) -> int:
        """How many rows come of each prompt."""
        count = 1 if self.num_return_sequences is None else self.num_return_sequences
        if count < 1 or (count > 1 and not self.do_sample):
            what = "at least 1" if count < 1 else "1 without do_sample=True: greedy continuations are all the same"
            raise RequestError(f"num_return_sequences is {count}; legal is {what}")
        return count

    def sampling(self, prompt: int) -> Sampling:
        """The same for `stream`, behind a prompt of that many tokens. Raises RequestError as `require_possible`."""
        self.require_possible()
        stated = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.min_length is not None:
            stated.setdefault("min_new_tokens", max(0, self.min_length - prompt))
        if self.do_sample:
            stated["temperature"] = 1.0 if self.temperature is None else self.temperature
            if stated["temperature"] <= 0:
                raise RequestError(f"temperature is {self.temperature}; legal with do_sample=True is above 0")
        top_k = 50 if self.top_k is None else self.top_k
        ends = self.ends()
        words = tuple(tuple(word) for word in self.bad_words_ids or ())
        return Sampling(
            top_k=top_k,
            eos_token_ids=ends,
            bad_words_ids=tuple(word for word in words if len(word) > 1 or word[0] not in ends),
            suppress_tokens=_ids(self.suppress_tokens),
            **stated,
        )

    def ends(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        return _ids(self.eos_token_id)

    def stops(self) -> tuple[str, ...]:
        """The texts behind which a row ends."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)


_SAMPLING = (
    "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "seed", "pad_token_id", "min_new_tokens",
)  # fmt: skip
_NAMES = tuple(each.name for each in fields(GenerationConfig) if each.name != "others")
_WORDS = {*_NAMES, *ONLY} - {"seed", "cache_dtype", "output_attentions", "output_hidden_states"}
"""Transformers' words for generating, without those that a model configuration has for its own forward pass."""


def _ids(stated: Any) -> tuple[int, ...]:
    """Ids in any usual form: none, one, a list, a tensor."""
    if stated is None:
        return ()
    if hasattr(stated, "tolist"):
        stated = stated.tolist()
    return (stated,) if isinstance(stated, int) else tuple(int(each) for each in stated)


def _hint(name: str) -> str:
    meant = difflib.get_close_matches(name, _NAMES, n=1)
    return f"did you mean {meant[0]!r}?" if meant else f"it takes {', '.join(_NAMES)}"


@contextmanager
def _as_config_error() -> Iterator[None]:
    """What is illegal in a file is the file's fault, and no request's."""
    try:
        yield
    except RequestError as error:
        raise ConfigError(str(error)) from None
