"""Text to token ids and back, with the fast tokenizer that a model folder carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neoquant.errors import CheckpointError, locate

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")


class Tokenizer:
    """A byte-level BPE: nothing is added to the text, every text comes back as it was.

    `eos_token_id` is also GPT-Neo's beginning of text. `sha256` identifies vocabulary and merges.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT) -> None:
        # A file may carry truncation or padding that some training run left in it: neither belongs to a text.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        eos = backend.token_to_id(eos_token)
        if eos is None:
            raise CheckpointError(f"the tokenizer has no {eos_token!r}, which marks the end of a text")
        self.eos_token = eos_token
        self.eos_token_id: int = eos
        self.bos_token_id: int = eos
        self.sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, from a model folder.

        Raises CheckpointError where there is neither, or what is there cannot be read.
        """
        import tokenizers

        folder = Path(folder)
        fast, vocab, merges = (folder / name for name in FILES)
        with locate(str(folder)):
            if not fast.exists() and not (vocab.exists() and merges.exists()):
                raise CheckpointError("no tokenizer here: neither tokenizer.json nor vocab.json with merges.txt")
            try:
                if fast.exists():
                    backend = tokenizers.Tokenizer.from_file(str(fast))
                else:
                    backend = tokenizers.ByteLevelBPETokenizer(str(vocab), str(merges))._tokenizer
                    backend.add_special_tokens([END_OF_TEXT])
            except Exception as error:  # the library raises bare Exception for a damaged file
                name = fast.name if fast.exists() else "vocab.json or merges.txt"
                raise CheckpointError(f"{name} cannot be read as a tokenizer: {error}") from None
            return cls(backend, _eos_token(folder))

    @property
    def vocab_size(self) -> int:
        """Entries, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added at either end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, worked out in parallel."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _eos_token(folder: Path) -> str:
    """What the folder's own tokenizer configuration calls the end of a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} is not readable as JSON: {error}") from None
        token = values.get("eos_token") if isinstance(values, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return END_OF_TEXT
