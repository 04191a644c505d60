"""Quantize GPT-Neo, save it where others can read it, and know what it cost.

    import neoquant

    model, tokenizer = neoquant.load("gpt-neo-1.3B-nf4")

Names are imported when they are first used, so that `import neoquant` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neoquant.errors import (
    CheckpointError,
    ConfigError,
    ContextError,
    DataError,
    FormatError,
    HubError,
    NeoquantError,
    OutputError,
    RecipeError,
    RequestError,
)

if TYPE_CHECKING:
    from neoquant.adapters import get_peft_model, load_peft_model
    from neoquant.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from neoquant.checkpoint.upload import push
    from neoquant.conversion import convert
    from neoquant.evaluation.compare import compare
    from neoquant.evaluation.inspection import inspect
    from neoquant.evaluation.perplexity import evaluate
    from neoquant.loading import LoadWarning, load, load_tokenizer
    from neoquant.model.config import GPTNeoConfig
    from neoquant.model.generate import TextStreamer, generate_text
    from neoquant.model.generation_config import GenerationConfig
    from neoquant.model.gpt_neo import GPTNeoForCausalLM, GPTNeoModel
    from neoquant.model.heads import (
        GPTNeoForQuestionAnswering,
        GPTNeoForSequenceClassification,
        GPTNeoForTokenClassification,
    )
    from neoquant.model.tokenizer import Tokenizer
    from neoquant.model.tokenizer import Tokenizer as GPT2Tokenizer
    from neoquant.pipelines import pipeline
    from neoquant.quantization import plan, quantize
    from neoquant.quantization_config import BitsAndBytesConfig, GPTQConfig
    from neoquant.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "AutoConfig": "neoquant.auto",
    "AutoModel": "neoquant.auto",
    "AutoModelForCausalLM": "neoquant.auto",
    "AutoModelForQuestionAnswering": "neoquant.auto",
    "AutoModelForSequenceClassification": "neoquant.auto",
    "AutoModelForTokenClassification": "neoquant.auto",
    "AutoTokenizer": "neoquant.auto",
    "BitsAndBytesConfig": "neoquant.quantization_config",
    "GPT2Tokenizer": "neoquant.model.tokenizer",
    "GPTNeoConfig": "neoquant.model.config",
    "GPTNeoForCausalLM": "neoquant.model.gpt_neo",
    "GPTNeoForQuestionAnswering": "neoquant.model.heads",
    "GPTNeoForSequenceClassification": "neoquant.model.heads",
    "GPTNeoForTokenClassification": "neoquant.model.heads",
    "GPTNeoModel": "neoquant.model.gpt_neo",
    "GPTQConfig": "neoquant.quantization_config",
    "GenerationConfig": "neoquant.model.generation_config",
    "LoadWarning": "neoquant.loading",
    "Recipe": "neoquant.recipe",
    "TextStreamer": "neoquant.model.generate",
    "Tokenizer": "neoquant.model.tokenizer",
    "compare": "neoquant.evaluation",
    "convert": "neoquant.conversion",
    "evaluate": "neoquant.evaluation",
    "generate_text": "neoquant.model.generate",
    "get_peft_model": "neoquant.adapters",
    "inspect": "neoquant.evaluation",
    "load": "neoquant.loading",
    "load_peft_model": "neoquant.adapters",
    "load_tokenizer": "neoquant.loading",
    "pipeline": "neoquant.pipelines",
    "plan": "neoquant.quantization",
    "push": "neoquant.checkpoint.upload",
    "quantize": "neoquant.quantization",
}

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "DataError",
    "FormatError",
    "GPT2Tokenizer",
    "GPTNeoConfig",
    "GPTNeoForCausalLM",
    "GPTNeoForQuestionAnswering",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoModel",
    "GPTQConfig",
    "GenerationConfig",
    "HubError",
    "LoadWarning",
    "NeoquantError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "RequestError",
    "TextStreamer",
    "Tokenizer",
    "__version__",
    "compare",
    "convert",
    "evaluate",
    "generate_text",
    "get_peft_model",
    "inspect",
    "load",
    "load_peft_model",
    "load_tokenizer",
    "pipeline",
    "plan",
    "push",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neoquant' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
