"""Text to token ids and back, with the fast tokenizer that a model folder carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neoquant.checkpoint import find_companions
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.tokenizer.encoding import SIDES, BatchEncoding, as_tensors, pad

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
NO_LIMIT = int(1e30)
"""`model_max_length` of a tokenizer that states none, as transformers has it."""

_PADDING = (False, "do_not_pad", True, "longest", "max_length")
_TRUNCATION = (False, "do_not_truncate", True, "longest_first", "only_first")


class Tokenizer:
    """A byte-level BPE: nothing is added to the text, every text comes back as it was.

    `eos_token_id` is also GPT-Neo's beginning of text. `sha256` identifies vocabulary and merges. `pad_token`, which
    GPT-Neo lacks, and `padding_side` may be set.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT, said: Mapping[str, Any] | None = None
    ) -> None:
        """`said` is what the folder's `tokenizer_config.json` says: `pad_token`, `padding_side`, `model_max_length`."""
        # A file may carry truncation or padding that some training run left in it: neither belongs to a text.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        eos = backend.token_to_id(eos_token)
        if eos is None:
            raise CheckpointError(f"the tokenizer has no {eos_token!r}, which marks the end of a text")
        self.eos_token = self.bos_token = eos_token
        self.eos_token_id: int = eos
        self.bos_token_id: int = eos
        self.sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()
        said = said or {}
        self.pad_token = _token(said.get("pad_token"))
        self.padding_side = said["padding_side"] if said.get("padding_side") in SIDES else "right"
        limit = said.get("model_max_length")
        self.model_max_length = int(limit) if isinstance(limit, int | float) and limit >= 1 else NO_LIMIT

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a folder, or of an id on the hub. Raises CheckpointError or HubError."""
        return cls.from_folder(find_companions(source, revision=revision))

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
            return cls(backend, *_said(folder))

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """The ids of one text or several, as transformers' tokenizers give them; nothing is added at either end.

        Args:
            text: one text, or a list of them.
            text_pair: as many texts that follow the first ones, without anything between.
            padding: True or "longest" (to the longest text), "max_length", or False. On `padding_side`.
            truncation: True cuts what is behind `max_length` tokens.
            max_length: for both; None is `model_max_length`.
            return_tensors: "pt" or "np"; None gives lists.
            return_attention_mask: also give `attention_mask`, 0 on padding.
            return_offsets_mapping: also give `offset_mapping`, where each token begins and ends in its text.
            add_special_tokens: GPT-Neo has none to add.

        Raises RequestError for padding without a `pad_token`, texts of several lengths as a tensor, or illegal values.
        """
        for name, value, legal in (("padding", padding, _PADDING), ("truncation", truncation, _TRUNCATION)):
            if value not in legal:
                raise RequestError(f"{name} is {value!r}; legal are {', '.join(map(repr, legal))}")
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        encodings = self.backend.encode_batch(self._inputs(texts, text_pair), add_special_tokens=False)
        limit = self.model_max_length if max_length is None else max_length
        cut = limit if truncation and truncation != "do_not_truncate" else None
        columns: dict[str, list[list[Any]]] = {"input_ids": [encoding.ids[:cut] for encoding in encodings]}
        fillers: dict[str, Any] = {}
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        if return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets[:cut] for encoding in encodings]
        if padding and padding != "do_not_pad":
            fillers = {"input_ids": self._filler(), "attention_mask": 0, "offset_mapping": (0, 0)}
            width = max((len(row) for row in columns["input_ids"]), default=0)
            width = limit if padding == "max_length" and limit < NO_LIMIT else width
            columns = {name: pad(rows, width, fillers[name], self.padding_side) for name, rows in columns.items()}
        if return_tensors is not None:
            return as_tensors(columns, return_tensors)
        return BatchEncoding({name: rows[0] for name, rows in columns.items()} if single else columns)

    def _inputs(self, texts: list[str], pairs: str | Sequence[str] | None) -> list[Any]:
        if pairs is None:
            return texts
        pairs = [pairs] if isinstance(pairs, str) else list(pairs)
        if len(pairs) != len(texts):
            raise RequestError(f"text_pair holds {len(pairs)} texts, text {len(texts)}: they go together one by one")
        return list(zip(texts, pairs, strict=True))

    def _filler(self) -> int:
        if self.pad_token_id is None:
            raise RequestError(
                "padding needs a pad_token, and this tokenizer has none: set tokenizer.pad_token = tokenizer.eos_token"
            )
        return self.pad_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`; None without one. Raises RequestError for one that is no token."""
        if self.pad_token is None:
            return None
        found: int | None = self.backend.token_to_id(self.pad_token)
        if found is None:
            raise RequestError(f"pad_token is {self.pad_token!r}, which is no token of this tokenizer")
        return found

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

    def decode(self, ids: Sequence[int] | torch.Tensor | int, *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        flat = torch.as_tensor(ids).reshape(-1).tolist() if isinstance(ids, torch.Tensor | int) else list(map(int, ids))
        return self.backend.decode(flat, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | torch.Tensor, *, skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def convert_ids_to_tokens(self, ids: Sequence[int] | torch.Tensor) -> list[str | None]:
        """Each id's entry in the vocabulary, where bytes are spelled as letters."""
        return [self.backend.id_to_token(int(i)) for i in ids]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.eos_token),
            **({} if self.pad_token is None else {"pad_token": self.pad_token}),
            "padding_side": self.padding_side,
            **({} if self.model_max_length == NO_LIMIT else {"model_max_length": self.model_max_length}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _said(folder: Path) -> tuple[str, dict[str, Any]]:
    """What the folder's own tokenizer configuration calls the end of a text, and all that it says."""
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} is not readable as JSON: {error}") from None
        said = {**values, **said} if isinstance(values, dict) else said  # the first file has the last word
    return _token(said.get("eos_token")) or END_OF_TEXT, said


def _token(said: object) -> str | None:
    """A token as these files spell it: a string, or an object around one."""
    content = said.get("content") if isinstance(said, dict) else said
    return content if isinstance(content, str) else None


GPT2Tokenizer = Tokenizer
"""The name under which transformers has it: GPT-Neo's vocabulary is GPT-2's."""
