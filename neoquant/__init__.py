"""Quantize GPT-Neo, save it in formats that other programs read, and measure the accuracy loss.

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
    LostProcessError,
    NeoquantError,
    OutputError,
    RecipeError,
    RequestError,
)

if TYPE_CHECKING:
    from neoquant.checkpoint.upload import push
    from neoquant.evaluation.compare import compare
    from neoquant.evaluation.inspection import inspect
    from neoquant.evaluation.perplexity import evaluate
    from neoquant.generation.config import GenerationConfig
    from neoquant.generation.text import TextStreamer, generate_text
    from neoquant.hf.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from neoquant.hf.pipelines import pipeline
    from neoquant.loading.fill import LoadWarning
    from neoquant.loading.pretrained import (
        GPTNeoForCausalLM,
        GPTNeoForQuestionAnswering,
        GPTNeoForSequenceClassification,
        GPTNeoForTokenClassification,
        GPTNeoModel,
        load,
        load_tokenizer,
    )
    from neoquant.loading.quantization_config import BitsAndBytesConfig, GPTQConfig
    from neoquant.model.config import GPTNeoConfig
    from neoquant.nn.lora import get_peft_model, load_peft_model
    from neoquant.quantization.convert import convert
    from neoquant.quantization.quantize import plan, quantize
    from neoquant.quantization.recipe import Recipe
    from neoquant.tokenizer.tokenizer import Tokenizer
    from neoquant.tokenizer.tokenizer import Tokenizer as GPT2Tokenizer
    from neoquant.tuning.tune import tune

__version__ = "0.1.0"

_HOMES = {
    "AutoConfig": "neoquant.hf.auto",
    "AutoModel": "neoquant.hf.auto",
    "AutoModelForCausalLM": "neoquant.hf.auto",
    "AutoModelForQuestionAnswering": "neoquant.hf.auto",
    "AutoModelForSequenceClassification": "neoquant.hf.auto",
    "AutoModelForTokenClassification": "neoquant.hf.auto",
    "AutoTokenizer": "neoquant.hf.auto",
    "BitsAndBytesConfig": "neoquant.loading.quantization_config",
    "GPT2Tokenizer": "neoquant.tokenizer.tokenizer",
    "GPTNeoConfig": "neoquant.model.config",
    "GPTNeoForCausalLM": "neoquant.loading.pretrained",
    "GPTNeoForQuestionAnswering": "neoquant.loading.pretrained",
    "GPTNeoForSequenceClassification": "neoquant.loading.pretrained",
    "GPTNeoForTokenClassification": "neoquant.loading.pretrained",
    "GPTNeoModel": "neoquant.loading.pretrained",
    "GPTQConfig": "neoquant.loading.quantization_config",
    "GenerationConfig": "neoquant.generation.config",
    "LoadWarning": "neoquant.loading.fill",
    "Recipe": "neoquant.quantization.recipe",
    "TextStreamer": "neoquant.generation.text",
    "Tokenizer": "neoquant.tokenizer.tokenizer",
    "compare": "neoquant.evaluation",
    "convert": "neoquant.quantization.convert",
    "evaluate": "neoquant.evaluation",
    "generate_text": "neoquant.generation.text",
    "get_peft_model": "neoquant.nn.lora",
    "inspect": "neoquant.evaluation",
    "load": "neoquant.loading.pretrained",
    "load_peft_model": "neoquant.nn.lora",
    "load_tokenizer": "neoquant.loading.pretrained",
    "pipeline": "neoquant.hf.pipelines",
    "plan": "neoquant.quantization.quantize",
    "push": "neoquant.checkpoint.upload",
    "quantize": "neoquant.quantization.quantize",
    "tune": "neoquant.tuning.tune",
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
    "LostProcessError",
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
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neoquant' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
