"""Text to token ids and back, with the tokenizer that a model folder carries."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neoquant.checkpoint import Push, find_companions
from neoquant.checkpoint.keywords import without_keywords
from neoquant.checkpoint.upload import push_files, require_repo
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.tokenizer.backend import build_backend, write_vocabulary
from neoquant.tokenizer.chat import choose_template, render_chat, render_unfinished
from neoquant.tokenizer.encoding import BatchEncoding, as_tensors, lengths, padded_columns, truncating
from neoquant.tokenizer.saving import save_tokenizer, stated_config
from neoquant.tokenizer.settings import (
    END_OF_TEXT,
    FAST,
    SLOW_MERGES,
    SLOW_VOCAB,
    TokenizerSettings,
    read_object,
    read_settings,
)
from neoquant.tokenizer.training import trained_backend
from neoquant.tokenizer.vocabulary import Vocabulary
from neoquant.tokenizer.words import refuse_options

if TYPE_CHECKING:
    import tokenizers

# Spaces that some tokenizers put before punctuation, as transformers' clean_up_tokenization removes them.
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer(Vocabulary):
    """The ids of texts, and the texts of ids, as transformers 5 gives them for the same folder.

    Its attributes may be set: `pad_token` (which GPT-Neo lacks) and every other special token, or their ids;
    `padding_side`, `truncation_side`, `model_max_length`, `add_bos_token` and the like.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None = None,
        settings: TokenizerSettings | None = None,
        *,
        vocab: str | Path | Mapping[str, int] | None = None,
        merges: str | Path | Sequence[Any] | None = None,
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        tokenizer_object: tokenizers.Tokenizer | None = None,
        **options: Any,
    ) -> None:
        """From a pipeline, from GPT-2's vocabulary and merges, which are contents or files, or from a tokenizer.json.

        Args:
            backend: the pipeline. Without `settings`, the end of text is `<|endoftext|>`, where it knows that.
            vocab: token -> id, with `merges`, in the place of a pipeline.
            merges: pairs of tokens, or "first second", in their order.
            vocab_file, merges_file, tokenizer_object: transformers 4's names of `vocab`, `merges` and `backend`.
            tokenizer_file: the path of a tokenizer.json.
            options: settings beside vocabulary and merges, those of `from_pretrained`.

        Raises RequestError for neither or both, CheckpointError for what is no vocabulary.
        """
        backend = tokenizer_object if backend is None else backend
        vocab, merges = vocab_file if vocab is None else vocab, merges_file if merges is None else merges
        if backend is None:
            with tempfile.TemporaryDirectory() as temp:
                if tokenizer_file is None:
                    write_vocabulary(Path(temp), vocab, merges)
                fast = None if tokenizer_file is None else _read_fast(Path(tokenizer_file))
                settings = read_settings(Path(temp), fast, options)
                backend = build_backend(Path(temp), fast, settings)
        elif vocab is not None or merges is not None or options:
            raise RequestError("vocab, merges and settings by name make a tokenizer that is given no backend")
        # A file may carry truncation or padding that some training run left in it: neither belongs to a text.
        backend.no_truncation()
        backend.no_padding()
        if settings is None:
            known = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None
            settings = TokenizerSettings(
                gpt2=False, special=dict.fromkeys(("bos_token", "eos_token", "unk_token"), known)
            )
        super().__init__(backend, settings)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        pretrained_model_name_or_path: str | Path | None = None,
        **settings: Any,
    ) -> Tokenizer:
        """The tokenizer of a folder, or of an id on the hub; None is the bundled model's.

        `settings` come before those of its files: `pad_token`, `padding_side`, `add_bos_token` and the like. Keywords
        that say where transformers looks for files (`checkpoint.keywords`) are taken or answered, `use_fast` too: there
        is no other kind. Raises CheckpointError, HubError or RequestError.
        """
        source = pretrained_model_name_or_path if source is None else source
        settings = without_keywords(settings)
        tokenizer = cls.from_folder(find_companions(source, revision=revision), **settings)
        tokenizer.name_or_path = tokenizer.name_or_path if source is None else str(source)
        return tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, **settings: Any) -> Tokenizer:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, and what the files beside them say.

        Raises CheckpointError where there is neither, or what is there cannot be read; RequestError for a setting that
        there is not.
        """
        folder = Path(folder)
        with locate(str(folder)):
            has_fast = (folder / FAST).exists()
            if not has_fast and not _has_slow_files(folder):
                raise CheckpointError(
                    f"no tokenizer here: neither {FAST} nor {SLOW_VOCAB} with {SLOW_MERGES}; copy the files of the one "
                    f"that the model was trained with into the folder ({_where_it_may_be(folder)})"
                )
            fast = _read_fast(folder / FAST) if has_fast else None
            read = read_settings(folder, fast, settings)
            tokenizer = cls(build_backend(folder, fast, read), read)
        tokenizer.name_or_path = str(folder)
        return tokenizer

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        text_pair: str | Sequence[str] | None = None,
        text_target: str | Sequence[Any] | None = None,
        text_pair_target: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """The ids of one text or several, as transformers' tokenizers give them.

        Args:
            text: one text, or a list of them, or of pairs.
            text_pair: as many texts that follow the first ones.
            text_target: what the texts are to become; its ids are `labels`, or, without `text`, are all that is given.
            text_pair_target: as many texts that follow those.
            options: those of `encoded`.

        Raises RequestError where neither texts nor targets are given, for other options, and what `encoded` does.
        """
        refuse_options("calling a tokenizer", options, _CALLED)
        targets = None if text_target is None else self.encoded(text_target, text_pair_target, **options)
        if text is not None:
            made = self.encoded(text, text_pair, **options)
            made |= {} if targets is None else {"labels": targets["input_ids"]}
            return made
        if targets is None:
            raise RequestError("there is nothing to encode: give text, or text_target for labels alone")
        return targets

    def encoded(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """What calling the tokenizer gives for texts without targets.

        Args:
            text: one text, or a list of them, or of pairs.
            text_pair: as many texts that follow the first ones.
            add_special_tokens: with what tokenizer.json or `add_bos_token` put around each text (GPT-Neo: nothing).
            padding: True or "longest" (to the longest text), "max_length", or False.
            truncation: True or "longest_first", "only_first", "only_second" of a pair, or False. None truncates where
                `max_length` is given without padding. Tokens are cut off on `truncation_side`.
            max_length: for both, special tokens included; None is `model_max_length`.
            stride: tokens that a row of what is cut off shares with the one before.
            is_split_into_words: a text is a list of words, each encoded by itself.
            pad_to_multiple_of: pad to the next multiple of it.
            padding_side: "left" or "right"; None is the tokenizer's.
            return_tensors: "pt" or "np"; None gives lists.
            return_token_type_ids: give `token_type_ids`, 1 on second texts; None asks `model_input_names`.
            return_attention_mask: give `attention_mask`, 0 on padding; None asks `model_input_names`.
            return_overflowing_tokens: what is cut off is given in rows of its own; `overflow_to_sample_mapping` has
                the text that each row is of.
            return_special_tokens_mask: give `special_tokens_mask`, 1 on added tokens and padding.
            return_offsets_mapping: give `offset_mapping`, where each token begins and ends in its text.
            return_length: give `length`, the tokens of each row, padding included.
            split_special_tokens: spell special tokens in a text out like any other text; None is the tokenizer's.
            verbose: for transformers' sake; nothing is said either way.

        Raises RequestError for padding without a `pad_token`, texts of several lengths as a tensor, or illegal values.
        """
        special = self.num_special_tokens_to_add(text_pair is not None) if stride and add_special_tokens else 0
        wanted = lengths(
            padding, truncation, max_length, self.model_max_length, pad_to_multiple_of, stride=stride, special=special
        )
        side = self.padding_side if padding_side is None else padding_side
        pad_id = 0 if wanted.padded is None else self._pad_id()
        is_words = is_split_into_words and not isinstance(text, str) and all(isinstance(word, str) for word in text)
        single = isinstance(text, str) or is_words
        given: Any = [text] if is_words else text
        pairs: Any = [text_pair] if is_words and text_pair is not None else text_pair
        with truncating(self.backend, wanted, self.truncation_side), self._splitting(split_special_tokens):
            encodings = self.backend.encode_batch(
                _inputs(given, pairs), add_special_tokens=add_special_tokens, is_pretokenized=is_split_into_words
            )
        numbers = list(range(len(encodings)))
        if return_overflowing_tokens:
            numbers = [number for number in numbers for _ in range(1 + len(encodings[number].overflowing))]
            encodings = [row for encoding in encodings for row in (encoding, *encoding.overflowing)]
        columns: dict[str, list[list[Any]]] = {"input_ids": [encoding.ids for encoding in encodings]}
        if self._gives("token_type_ids", return_token_type_ids):
            columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if self._gives("attention_mask", return_attention_mask):
            columns["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [encoding.special_tokens_mask for encoding in encodings]
        if return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets for encoding in encodings]
        columns = padded_columns(columns, wanted, pad_id, side)
        if wanted.padded is not None:
            for encoding, ids in zip(encodings, columns["input_ids"], strict=True):
                encoding.pad(len(ids), direction=side, pad_id=pad_id, pad_token=self.pad_token or "")
        whole: dict[str, list[Any]] = {"length": [len(ids) for ids in columns["input_ids"]]} if return_length else {}
        whole |= {"overflow_to_sample_mapping": numbers} if return_overflowing_tokens else {}
        if return_tensors is not None:
            made = as_tensors({**columns, **whole}, return_tensors)
        elif single and not return_overflowing_tokens:
            made = BatchEncoding({**{name: rows[0] for name, rows in columns.items()}, **whole})
        else:
            made = BatchEncoding({**columns, **whole})
        made.encodings = encodings
        return made

    @contextmanager
    def _splitting(self, split: bool | None) -> Iterator[None]:
        """Let the library spell special tokens out, or not, while this lasts. It keeps this in the tokenizer itself."""
        own = self.backend.encode_special_tokens
        if split is None or bool(split) == own:
            yield
            return
        self.backend.encode_special_tokens = bool(split)
        try:
            yield
        finally:
            self.backend.encode_special_tokens = own

    def _gives(self, column: str, asked: bool | None) -> bool:
        return column in self.model_input_names if asked is None else asked

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise RequestError(
                "padding needs a pad_token, and this tokenizer has none: set tokenizer.pad_token = tokenizer.eos_token"
            )
        return self.pad_token_id

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation, or several, `{"role": ..., "content": ...}` a message, as the folder's chat template puts it.

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template of Jinja, or the name of one of the folder's; None is the folder's own.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end where the last message's content ends (or another part of it, by its name), so
                that it is gone on with.
            tools: schemas for the template, as objects of JSON.
            documents: for the template.
            tokenize: give ids, and not the text.
            return_dict: give what calling the tokenizer gives (as transformers 5 does); False gives `input_ids` alone.
            padding, truncation, max_length, return_tensors: those of calling.
            variables: for the template.

        Raises RequestError where there is no template, or it cannot be rendered.
        """
        template = choose_template(self.chat_template, chat_template, bool(tools))
        if not conversation:
            raise RequestError("the conversation is empty: give at least one message")
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message goes on with a message, add_generation_prompt begins another")
        several = not isinstance(conversation[0], Mapping)
        values = {
            **self.special_tokens_map, **variables, "tools": tools, "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        part = continue_final_message if isinstance(continue_final_message, str) else "content"
        texts = [
            render_unfinished(template, {**values, "messages": messages}, part)
            if continue_final_message
            else render_chat(template, {**values, "messages": messages})
            for messages in (conversation if several else [conversation])
        ]
        if not tokenize:
            return texts if several else texts[0]
        encoded = self(
            texts if several else texts[0],
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        return encoded if return_dict else encoded["input_ids"]

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The `input_ids` of calling the tokenizer with the same arguments: a list, or a tensor `[1, T]`."""
        if not options and text_pair is None:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def encode_plus(self, text: str | Sequence[Any], text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Calling the tokenizer with one text, by its name in transformers 4."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **options: Any) -> BatchEncoding:
        """Calling the tokenizer with texts, or pairs of them, by its name in transformers 4."""
        return self(batch_text_or_text_pairs, **options)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text, worked out in parallel."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids that generation continues: of an empty prompt, `bos_token`'s.

        Raises RequestError where there is nothing to begin with.
        """
        if not isinstance(prompt, str):
            raise RequestError(f"a prompt is one text, not of type {type(prompt).__name__}")
        ids = self.backend.encode(prompt).ids
        if ids:
            return ids
        if self.bos_token_id is None:
            raise RequestError("the prompt is empty, and the tokenizer has no bos_token to begin a text with")
        return [self.bos_token_id]

    def tokenize(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text, or of a pair, as the vocabulary spells them; `options` are those of calling."""
        if options:
            return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()
        return self.backend.encode(text, pair, add_special_tokens=add_special_tokens).tokens

    def pad(
        self,
        encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodings of single texts, or one of several, padded to one length. Arguments are those of calling.

        Raises RequestError without `input_ids` or a `pad_token`, or for a column that cannot be padded.
        """
        several = encoded if isinstance(encoded, Mapping) else {n: [e[n] for e in encoded] for n in encoded[0]}
        if "input_ids" not in several:
            raise RequestError(f"there is nothing to pad: the encoding has {', '.join(several)}, but no input_ids")
        columns: dict[str, Any] = {
            name: column.tolist() if hasattr(column, "tolist") else [_plain(row) for row in column]
            for name, column in several.items()
        }
        single = bool(columns["input_ids"]) and isinstance(columns["input_ids"][0], int)
        if single:
            columns = {name: [row] for name, row in columns.items()}
        if self._gives("attention_mask", return_attention_mask) and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        wanted = lengths(padding, False, max_length, self.model_max_length, pad_to_multiple_of)
        pad_id = 0 if wanted.padded is None else self._pad_id()
        columns = padded_columns(columns, wanted, pad_id, self.padding_side if padding_side is None else padding_side)
        if return_tensors is not None:
            return as_tensors(columns, return_tensors)
        return BatchEncoding({name: rows[0] for name, rows in columns.items()} if single else columns)

    def decode(
        self,
        ids: Sequence[Any] | torch.Tensor | int,
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> Any:
        """The text of `ids`, or the list of texts of several rows; bytes that are not UTF-8 become U+FFFD.

        `spaces_between_special_tokens` is for transformers' sake: its fast tokenizers put none there, whatever it is.
        `clean_up_tokenization_spaces` changes nothing for byte-level BPE, as in transformers 5, where the spaces are
        the text's own; a folder can force it.
        """
        plain = _plain(ids)
        rows: list[Any] = [plain] if isinstance(plain, int) else list(map(_plain, plain))
        if rows and isinstance(rows[0], list | tuple):
            return [self._text(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]
        return self._text(rows, skip_special_tokens, clean_up_tokenization_spaces)

    def _text(self, ids: list[int], skip_special_tokens: bool, clean_up: bool | None) -> str:
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if self.settings.clean_up and clean_up is not False:
            for spaced in _CLEAN_UP:
                text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(
        self, rows: Sequence[Any] | torch.Tensor, skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The text of each row."""
        decoded = self.decode(rows, skip_special_tokens, **options)
        return [decoded] if isinstance(decoded, str) and len(rows) else list(decoded)

    def save_pretrained(self, folder: str | Path, *, save_jinja_files: bool = True, **others: Any) -> tuple[str, ...]:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be.

        They hold all that the folder said from which the tokenizer comes, and what was set since. Chat templates have
        files of their own (`chat_template.jinja`), or are in `tokenizer_config.json` with `save_jinja_files=False`.
        Returns the files' paths. Raises RequestError for the name of a template that is no file's, and for `others`,
        transformers' options, that ask for other files.
        """
        asked = [name for name, value in others.items() if value not in (None, False)]
        refuse_options("a tokenizer's save_pretrained", asked, ("save_jinja_files",))
        return save_tokenizer(self.backend, self.settings, Path(folder), save_jinja_files)

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[Any] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Tokenizer:
        """A tokenizer with this one's pipeline and settings, whose `vocab_size` tokens are learned from texts.

        Args:
            text_iterator: texts, or lists of them.
            vocab_size: special tokens included.
            length: how many texts there are.
            new_special_tokens: further ones.
            special_tokens_map: former special token -> what it is called now.
            options: of the library's BpeTrainer (`min_frequency`, `max_token_length`, ...).

        Raises RequestError for a model that is no BPE, or what the trainer refuses.
        """
        renamed = dict(special_tokens_map or {})
        backend = trained_backend(
            self.backend, text_iterator, vocab_size, special=renamed, added=new_special_tokens or (), length=length,
            options=options,
        )  # fmt: skip
        settings = copy.deepcopy(self.settings)
        settings.special = {name: renamed.get(token or "", token) for name, token in settings.special.items()}
        settings.additional = [renamed.get(token, token) for token in settings.additional]
        settings.additional += [str(token) for token in new_special_tokens or ()]
        settings.added = dict(backend.get_added_tokens_decoder())
        return Tokenizer(backend, settings)

    init_inputs: tuple[Any, ...] = ()
    """What was given without names, as transformers keeps it."""

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """What `tokenizer_config.json` would say."""
        return stated_config(self.backend, self.settings, templates=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str = "main",
    ) -> Push:
        """Send what `save_pretrained` writes to `repo_id` ("user/name") on the hub, where all else stays.

        Raises RequestError and HubError.
        """
        require_repo(repo_id)
        with tempfile.TemporaryDirectory(prefix="neoquant-push-") as temp:
            self.save_pretrained(temp)
            message = commit_message or "Upload tokenizer"
            return push_files(
                Path(temp), repo_id, private=bool(private), revision=revision, message=message, token=token
            )


def _has_slow_files(folder: Path) -> bool:
    return all((folder / name).exists() for name in (SLOW_VOCAB, SLOW_MERGES))


def _where_it_may_be(folder: Path) -> str:
    """Where people find the tokenizer of a model that was saved without one: a training run saves it beside its
    checkpoints, if at all, and models of GPT-2's vocabulary have GPT-Neo's."""
    parent = folder.resolve().parent
    if (parent / FAST).exists() or _has_slow_files(parent):
        return f"{parent} holds one"
    return "with GPT-2's vocabulary, those of EleutherAI/gpt-neo-125m"


def _read_fast(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} cannot be read as a tokenizer: {error.message}") from None


def _inputs(text: str | Sequence[Any], pairs: str | Sequence[str] | None) -> list[Any]:
    """What the library encodes: texts, or pairs. Raises RequestError for texts that do not go together."""
    texts = [text] if isinstance(text, str) else list(text)
    if pairs is None or (pairs == "" and isinstance(text, str)):  # transformers takes an empty second text as none
        return texts
    if isinstance(pairs, str) != isinstance(text, str):
        raise RequestError("text and text_pair go together one by one: pass two texts, or two lists")
    several = [pairs] if isinstance(pairs, str) else list(pairs)
    if len(several) != len(texts):
        raise RequestError(f"text_pair holds {len(several)} texts, text {len(texts)}: they go together one by one")
    return list(zip(texts, several, strict=True))


def _plain(values: Any) -> Any:
    """Tensors, arrays and numbers of theirs as plain lists and numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


_CALLED = [name for name in signature(Tokenizer.encoded).parameters if name not in ("self", "text", "text_pair")]
"""The options of calling a tokenizer."""

GPT2Tokenizer = Tokenizer
"""The name under which transformers has it: GPT-Neo's vocabulary is GPT-2's."""
