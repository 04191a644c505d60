"""What may be asked of `generate`, in transformers' words, and what a folder's generation_config.json asks for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from neoquant.errors import ConfigError, RequestError, locate
from neoquant.generation.generate import Sampling

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20  # transformers' own

# What transformers also takes and neoquant does in one way only: any other value is refused.
_FIXED: Mapping[str, Any] = {
    "num_beams": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
}
# What a file says about itself, or about tokens that GPT-Neo's generation does not use.
_NO_WISHES = ("bos_token_id", "decoder_start_token_id", "transformers_version", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is continued; None leaves it to the default, which is transformers'.

    `max_length` and `min_length` count the prompt, `max_new_tokens` and `min_new_tokens` do not and have precedence;
    without either maximum, 20 new tokens.
    `do_sample=False` takes the likeliest token; `temperature`, `top_k`, `top_p`, `repetition_penalty` and `seed` are
    `Sampling`'s. `num_return_sequences` rows come of each prompt. Rows end at `eos_token_id`, or behind one of
    `stop_strings`, and are filled up with `pad_token_id`.
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
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    seed: int | None = None

    @classmethod
    def of(cls, said: Any) -> GenerationConfig:
        """From our own class, transformers', or plain values. Raises RequestError for what `generate` does not do."""
        if isinstance(said, cls):
            return said
        asked, faults = _sorted_out(said if isinstance(said, Mapping) else said.to_diff_dict())
        if faults:
            raise RequestError("; ".join(faults))
        return cls(**asked)

    @classmethod
    def from_folder(cls, folder: Path) -> tuple[GenerationConfig, list[str]]:
        """What the folder's file asks for, and what of it `generate` does not do; nothing where there is no file.

        Raises ConfigError for a file that is no JSON object.
        """
        path = folder / FILE
        if not path.is_file():
            return cls(), []
        with locate(str(path)):
            try:
                values = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"not readable as JSON: {error}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"holds a {type(values).__name__}, not an object")
        asked, faults = _sorted_out(values)
        return cls(**asked), faults

    def but(self, other: GenerationConfig) -> GenerationConfig:
        """This, except for what the other one states."""
        stated = other.to_dict()
        if "max_length" in stated and "max_new_tokens" not in stated:
            stated["max_new_tokens"] = None  # the newer word about the length counts
        return replace(self, **stated)

    def to_dict(self) -> dict[str, Any]:
        """What is stated."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    def new_tokens(self, prompt: int) -> int:
        """How many may follow a prompt of that many tokens. Raises RequestError where `max_length` leaves no room."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_NEW_TOKENS
        if self.max_length <= prompt:
            raise RequestError(
                f"max_length is {self.max_length}, and the prompt alone has {prompt} tokens: raise it, or say "
                "max_new_tokens, which does not count the prompt"
            )
        return self.max_length - prompt

    def copies(self) -> int:
        """How many rows come of each prompt."""
        count = 1 if self.num_return_sequences is None else self.num_return_sequences
        if count < 1 or (count > 1 and not self.do_sample):
            what = "at least 1" if count < 1 else "1 without do_sample=True: greedy continuations are all the same"
            raise RequestError(f"num_return_sequences is {count}; legal is {what}")
        return count

    def sampling(self, eos: int | Sequence[int] | None, prompt: int) -> Sampling:
        """The same for `stream`, behind a prompt of that many tokens; `eos` is the model's own end of text."""
        ends = eos if self.eos_token_id is None else self.eos_token_id
        stated = {
            name: getattr(self, name)
            for name in ("top_p", "repetition_penalty", "seed", "pad_token_id", "min_new_tokens")
            if getattr(self, name) is not None
        }
        if self.min_length is not None:
            stated.setdefault("min_new_tokens", max(0, self.min_length - prompt))
        if self.do_sample:
            stated["temperature"] = 1.0 if self.temperature is None else self.temperature
            if stated["temperature"] <= 0:
                raise RequestError(f"temperature is {self.temperature}; legal with do_sample=True is above 0")
        top_k = 50 if self.top_k is None else self.top_k
        return Sampling(top_k=top_k, eos_token_ids=_ids(ends), **stated)

    def stops(self) -> tuple[str, ...]:
        """The texts behind which a row ends."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)


def _ids(ends: Any) -> tuple[int, ...]:
    if ends is None:
        return ()
    if hasattr(ends, "tolist"):
        ends = ends.tolist()
    return (ends,) if isinstance(ends, int) else tuple(int(end) for end in ends)


def _sorted_out(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What is among our fields, and a sentence about everything else that asks for something."""
    known = [field.name for field in fields(GenerationConfig)]
    asked = {name: value for name, value in said.items() if name in known}
    others = {name: value for name, value in said.items() if name not in known and name not in _NO_WISHES}
    faults = [
        _unknown(name, value, known)
        for name, value in others.items()
        if not (value is None or name.startswith("_") or (name in _FIXED and value == _FIXED[name]))
    ]
    return asked, faults


def _unknown(name: str, value: Any, known: list[str]) -> str:
    if name in _FIXED:
        return f"{name} is {value!r}; neoquant generates with {_FIXED[name]!r} only"
    meant = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {meant[0]!r}?" if meant else f"it takes {', '.join(known)}"
    return f"generate does not know {name!r}; {hint}"
