"""What a model loses by being quantized: perplexity, bits per byte, and divergence from a reference."""

from neoquant.data.suite import Suite, load_suite, suite_names
from neoquant.evaluation.compare import compare
from neoquant.evaluation.inspection import inspect
from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.perplexity import EvaluatedModel, evaluate
from neoquant.evaluation.result import Comparison, Evaluation, ModelInfo

__all__ = [
    "Comparison",
    "EvaluatedModel",
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
