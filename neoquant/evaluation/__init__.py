"""What a model loses by being quantized: perplexity, bits per byte, and divergence from a reference."""

from neoquant.evaluation.compare import compare
from neoquant.evaluation.inspection import inspect
from neoquant.evaluation.layers import Inspection
from neoquant.evaluation.perplexity import Contestant, evaluate
from neoquant.evaluation.result import Comparison, Evaluation, ModelInfo
from neoquant.evaluation.suite import Suite, load_suite, suite_names

__all__ = [
    "Comparison",
    "Contestant",
    "Evaluation",
    "Inspection",
    "ModelInfo",
    "Suite",
    "compare",
    "evaluate",
    "inspect",
    "load_suite",
    "suite_names",
]
