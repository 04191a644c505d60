"""Files and tensors: read a checkpoint, write one. Knows nothing of quantization."""

from neoquant.checkpoint.headers import TensorHeader
from neoquant.checkpoint.reader import Checkpoint, companion_files, find_companions, open_checkpoint
from neoquant.checkpoint.upload import Push, push
from neoquant.checkpoint.writer import SHARD_SIZE, CheckpointWriter, check_output, expected_size, free_bytes

__all__ = [
    "SHARD_SIZE",
    "Checkpoint",
    "CheckpointWriter",
    "Push",
    "TensorHeader",
    "check_output",
    "companion_files",
    "expected_size",
    "find_companions",
    "free_bytes",
    "open_checkpoint",
    "push",
]
