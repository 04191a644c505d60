"""GPT-Neo for ONNX Runtime: the decoder with past keys and values, its 4- and 8-bit weights with the same codes.

    neoquant convert gpt-neo-1.3B-nf4 --to onnx

makes a folder that onnxruntime, onnxruntime-genai and transformers.js open. It needs the package onnx (an extra
of that name).
"""

from __future__ import annotations

from neoquant.onnx.export import OnnxExport, export

__all__ = ["OnnxExport", "export"]
