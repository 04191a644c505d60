"""Loading by what a model is for rather than by its class, under transformers' `Auto` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from neoquant.checkpoint import find_companions
from neoquant.checkpoint.keywords import without_keywords
from neoquant.errors import RequestError
from neoquant.loading.pretrained import (
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
    PreTrainedModel,
)
from neoquant.model.config import GPTNeoConfig
from neoquant.tokenizer.tokenizer import Tokenizer

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


class _Auto(Generic[ModelT]):
    """Makes models of `model_class`; it has no instances of its own."""

    model_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, **options: Any) -> ModelT:
        """A checkpoint, plain or quantized, from a folder or by its id on the hub.

        `options` (`dtype`, `device_map`, `attn_implementation`, ...) and errors are the model class's own.
        """
        return cls.model_class.from_pretrained(source, **options)  # type: ignore[return-value]

    @classmethod
    def from_config(cls, config: GPTNeoConfig, *, attn_implementation: str = "sdpa") -> ModelT:
        """Fresh weights, to be trained."""
        return cls.model_class(config, attn_implementation)  # type: ignore[return-value]


class AutoModel(_Auto[GPTNeoModel]):
    """The network without a head."""

    model_class = GPTNeoModel


class AutoModelForCausalLM(_Auto[GPTNeoForCausalLM]):
    """To continue texts."""

    model_class = GPTNeoForCausalLM


class AutoModelForSequenceClassification(_Auto[GPTNeoForSequenceClassification]):
    """To label whole texts."""

    model_class = GPTNeoForSequenceClassification


class AutoModelForTokenClassification(_Auto[GPTNeoForTokenClassification]):
    """To label each token."""

    model_class = GPTNeoForTokenClassification


class AutoModelForQuestionAnswering(_Auto[GPTNeoForQuestionAnswering]):
    """To find answers in texts."""

    model_class = GPTNeoForQuestionAnswering


class AutoConfig:
    """Reads configurations."""

    @staticmethod
    def from_pretrained(source: str | Path, *, revision: str | None = None, **others: Any) -> GPTNeoConfig:
        """The configuration of a folder, or of an id on the hub, of which no weights are fetched.

        `others` are transformers' keywords for where files are: taken or answered. Raises CheckpointError (ConfigError
        for one that is no legal GPT-Neo's), HubError or RequestError.
        """
        for name in without_keywords(others):
            raise RequestError(f"{name} is no keyword of reading a configuration: set it on the configuration")
        return GPTNeoConfig.from_pretrained(find_companions(source, revision=revision))


class AutoTokenizer:
    """Reads tokenizers."""

    @staticmethod
    def from_pretrained(source: str | Path | None = None, *, revision: str | None = None, **settings: Any) -> Tokenizer:
        """The tokenizer of a folder or hub id; `settings` (`pad_token`, `padding_side`, ...) come before its files'.

        Raises CheckpointError where there is none, HubError, or RequestError for a setting that there is not.
        """
        return Tokenizer.from_pretrained(source, revision=revision, **settings)
