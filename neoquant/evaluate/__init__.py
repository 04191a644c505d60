"""What a model loses by being quantized: perplexity, bits per byte, and divergence from a reference."""

from neoquant.evaluate.compare import Contestant, compare
from neoquant.evaluate.perplexity import evaluate
from neoquant.evaluate.result import Comparison, Evaluation, ModelInfo
from neoquant.evaluate.suite import Suite, load_suite, suite_names

__all__ = [
    "Comparison",
    "Contestant",
    "Evaluation",
    "ModelInfo",
    "Suite",
    "compare",
    "evaluate",
    "load_suite",
    "suite_names",
]
