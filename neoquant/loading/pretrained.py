"""The model classes that people name, with transformers' names: the networks of `model/`, to and from folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from neoquant.checkpoint import SHARD_SIZE, Push, open_checkpoint
from neoquant.errors import RequestError, locate
from neoquant.generation.config import FILE as GENERATION_FILE
from neoquant.generation.config import GenerationConfig, OnlyInTransformersError
from neoquant.generation.drafting import drafter_of
from neoquant.generation.generate import Processor, Streamer, as_ids, collect, generate, in_turn, require_in_vocabulary
from neoquant.generation.outputs import KeptScores
from neoquant.generation.padding import inferred_mask, stands_before
from neoquant.generation.speculative import stream_with_drafts
from neoquant.generation.stopping import ends_by, ends_with
from neoquant.loading.handed_over import generate_there
from neoquant.loading.keywords import overrides
from neoquant.loading.load import folder_of, load_model, read_model
from neoquant.loading.methods import ModelMethods
from neoquant.loading.save import push_model, save_model
from neoquant.model.base import Network
from neoquant.model.cache import KVCache, given_cache
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default
from neoquant.model.gpt_neo import CausalLM, Decoder
from neoquant.model.heads import QuestionAnswerer, SequenceClassifier, TokenClassifier
from neoquant.progress import SILENT, Progress
from neoquant.tokenizer.tokenizer import Tokenizer


class PreTrainedModel(ModelMethods):
    """What every model class adds to its network: fresh weights, the way from a folder or hub id, and back."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        attn_implementation: str | None = "sdpa",
        quantization_config: Any = None,
        mmap: bool = True,
        torch_dtype: torch.dtype | str | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int | str, str] | None = None,
        label2id: Mapping[str, int | str] | None = None,
        problem_type: str | None = None,
        output_loading_info: bool = False,
        pretrained_model_name_or_path: str | Path | None = None,
        **others: Any,
    ) -> Self:
        """Load a checkpoint, plain or quantized, from a folder or by its id on the hub.

        `dtype` is the type activations are computed in: a torch type, its name, `"auto"` (the checkpoint's own) or
        None (float32 on a CPU, bfloat16 on a GPU). `device_map` is a device, `"auto"`, or a mapping of parts of the
        model to devices or `"disk"`; `max_memory` says what `"auto"` may take of each (0 or "cpu" -> "2GB"). With
        `quantization_config`, a BitsAndBytesConfig or GPTQConfig (neoquant's or transformers'), their values or a
        Recipe (or the name of one), a plain checkpoint is quantized on the way.
        `mmap=False` copies weights that would lie in their file's own memory, which must not be cut short.
        `attn_implementation=None` is the default, as transformers has it.
        `torch_dtype` is transformers 4's name of `dtype`, `pretrained_model_name_or_path` its name of `source`.
        `num_labels` or `id2label` (or its inverse, `label2id`), and `problem_type`, are of a head that is to be
        trained. With `output_loading_info`, the model comes in a pair with what its `load_report` says, by
        transformers' names. `others` are transformers' other keywords: `loading.keywords` says which change nothing or
        count before config.json, and answers the rest.

        Raises CheckpointError, HubError or RequestError; a tensor that is missing or unexpected is one of the first.
        """
        settings = overrides(others)
        source = pretrained_model_name_or_path if source is None else source
        if dtype is not None and torch_dtype is not None:
            raise RequestError("dtype and torch_dtype are two names of the same: give one of them")
        options: dict[str, Any] = {
            "settings": settings | _labels(num_labels, _names(id2label, label2id), problem_type),
            "dtype": torch_dtype if dtype is None else dtype,
            "device": device_map,
            "max_memory": max_memory,
            "attn_implementation": attn_implementation or "sdpa",
            "mmap": mmap,
        }
        if quantization_config is not None:
            from neoquant.loading.quantize_on_load import load_quantized  # a third of a second that few loads need

            model = load_quantized(source, cls, quantization_config, revision=revision, **options)
        else:
            model = load_model(source, cls, revision=revision, **options)
        return (model, _loading_info(model)) if output_loading_info else model  # type: ignore[return-value]

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_size: int | str = SHARD_SIZE,
        safe_serialization: bool = True,
        force: bool = False,
    ) -> None:
        """Write a folder that transformers and neoquant read, in safetensors files of at most `max_shard_size` ("5GB").

        A model of the same kind that was saved there before is replaced when this one is complete; `force` replaces any
        other, too, which without it is an OutputError.
        """
        _require_safe(safe_serialization)
        save_model(self, folder, force=force, shard_size=max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str = "main",
        max_shard_size: int | str = SHARD_SIZE,
        safe_serialization: bool = True,
    ) -> Push:
        """Send what `save_pretrained` writes to `repo_id` ("user/name") on the hub, in one commit.

        A model card is made where there is none; a tokenizer there stays. `neoquant.push` sends a folder with all that
        is in it. Raises RequestError and HubError.
        """
        _require_safe(safe_serialization)
        return push_model(
            self,
            repo_id,
            shard_size=max_shard_size,
            private=bool(private),
            revision=revision,
            message=commit_message,
            token=token,
        )


def _loading_info(model: Network) -> dict[str, Any]:
    """What the report of loading says, by transformers' names."""
    report = model.load_report
    missing, unexpected = set(report.missing), set(report.unexpected)
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}


def _names(id2label: Mapping[int | str, str] | None, label2id: Mapping[str, int | str] | None) -> dict[int, str] | None:
    """Number of a label -> its name, by either mapping. Raises RequestError where they disagree."""
    names = None if id2label is None else {int(number): name for number, name in id2label.items()}
    numbers = None if label2id is None else {int(number): name for name, number in label2id.items()}
    if numbers is not None and (len(numbers) != len(label2id or ()) or names not in (None, numbers)):
        raise RequestError(f"label2id is {label2id!r:.100}, which is not the inverse of id2label: {names!r:.100}")
    return numbers if names is None else names


def _labels(num_labels: int | None, id2label: Mapping[int, str] | None, problem_type: str | None) -> dict[str, Any]:
    """What is said of a head's labels, as config.json has it. Raises RequestError where names and number disagree."""
    labels: dict[str, Any] = {"problem_type": problem_type} if problem_type is not None else {}
    if id2label is not None:
        if num_labels not in (None, len(id2label)):
            raise RequestError(f"num_labels is {num_labels}, and id2label names {len(id2label)} labels")
        labels["id2label"] = {str(number): name for number, name in id2label.items()}
        labels["label2id"] = {name: number for number, name in id2label.items()}
        num_labels = len(id2label)
    return labels if num_labels is None else {**labels, "num_labels": num_labels}


def _require_safe(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise RequestError(
            "safe_serialization=False asks for a pickle (pytorch_model.bin); legal is True only: neoquant writes "
            "safetensors, which transformers reads as well"
        )


class GPTNeoModel(PreTrainedModel, Decoder):
    """The network without a head: token ids to hidden states."""


class GPTNeoForCausalLM(PreTrainedModel, CausalLM):
    """GPT-Neo with its language-modelling head, whose weight is the token embedding's unless the config unties it."""

    generation_config: GenerationConfig
    """What `generate` does unless it is told otherwise: the folder's generation_config.json, or else what config.json
    says about generating."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.generation_config = GenerationConfig.from_model_config(config)

    def read_companions(self, folder: Path) -> list[str]:
        """Take what the folder says about generating as `generation_config`."""
        self.generation_config, unknown = GenerationConfig.from_folder(folder, self.config)
        return [f"{GENERATION_FILE}: {name!r} is no word for generating; left out" for name in unknown]

    def companions(self) -> dict[str, str]:
        """generation_config.json, where `generation_config` states anything."""
        stated = self.generation_config.to_dict()
        return {GENERATION_FILE: json.dumps(stated, indent=2, sort_keys=True) + "\n"} if stated else {}

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]] | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | Sequence[Sequence[int]] | Sequence[int] | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        generation_config: Any = None,
        tokenizer: Tokenizer | None = None,
        streamer: Streamer | None = None,
        assistant_model: CausalLM | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        past_key_values: KVCache | None = None,
        cache: KVCache | None = None,
        **asked: Any,
    ) -> Any:
        """`input_ids[B, T]` continued to `[B, T + new]`: greedy, or sampled with `do_sample=True`.

        `asked` are `GenerationConfig`'s fields, with transformers' names and defaults: `max_new_tokens`, `max_length`,
        `do_sample`, `temperature`, `top_k`, `top_p`, `num_return_sequences`, `stop_strings`, ... They count before
        `generation_config`, and that before the model's own; None takes back what the others say.

        Args:
            input_ids: the prompts; None begins with the beginning of a text (`bos_token_id`).
            attention_mask: `[B, T]`, 0 on padding, which may be on either side. Without it, what equals `pad_token_id`
                is padding, unless that also ends a text.
            inputs: transformers' other name for `input_ids`.
            position_ids: `[B, T]`, from which new tokens count on; None counts the tokens of each row.
            token_type_ids: `[B, T]`, embedded and added; new tokens have the last one's.
            generation_config: ours or transformers'.
            tokenizer: needed for `stop_strings`.
            streamer: told of the prompt and of each new id; transformers' streamers serve.
            assistant_model: a faster model of the same vocabulary, which guesses tokens that are then checked together;
                for one prompt.
            logits_processor: called one after another with all ids and the next token's logits, of which they return
                others; transformers' serve. They come behind penalties and before the temperature.
            stopping_criteria: called with all ids and None, and say whether all rows, or which, have ended;
                transformers' serve.
            past_key_values: what an earlier call with `return_dict_in_generate=True` gave beside its ids, which
                `input_ids` begins with: what is in it is not computed again, and it grows with the text; a new
                `KVCache` serves, too.
            cache: transformers' other name for `past_key_values`, since its version 5.24.

        Returns a GenerateDecoderOnlyOutput with `return_dict_in_generate=True`.

        What only transformers does (beams, guidance, `inputs_embeds`, attention weights, several prompts with drafts,
        ...) it does, where it is installed: `to_transformers().generate` is called with the same arguments.

        Raises:
            ContextError: the result would not fit into the context.
            RequestError: an illegal value, or something that is not done here.
            CheckpointError: the model's predictions are not finite.
        """
        if inputs is not None and input_ids is not None:
            raise RequestError("input_ids and inputs are two names of the same: give one of them")
        input_ids = inputs if input_ids is None else input_ids
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        beside: dict[str, Any] = {
            "tokenizer": tokenizer,
            "streamer": streamer,
            "assistant_model": assistant_model,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "past_key_values": given_cache(past_key_values, cache),
        }
        try:
            config = self.settings(generation_config, asked)
            ids = as_ids([[self._beginning(config)]] if input_ids is None else input_ids)
            return self.generate_as(config, ids, given, **beside)
        except OnlyInTransformersError as refusal:
            return generate_there(self, refusal, input_ids, generation_config, {**given, **beside}, asked)

    def generate_as(
        self,
        config: GenerationConfig,
        ids: Tensor,
        given: Mapping[str, Tensor | None],
        *,
        tokenizer: Tokenizer | None = None,
        streamer: Streamer | None = None,
        assistant_model: CausalLM | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        past_key_values: KVCache | None = None,
    ) -> Any:
        """`generate` with these settings alone; `given` are its other tensors of the shape of `ids[B, T]`, by name."""
        given = dict(given)
        if given.get("attention_mask") is None:
            given["attention_mask"] = inferred_mask(ids, config.pad_token_id, config.ends())
        require_in_vocabulary(self, ids, given["attention_mask"])
        copies = config.copies()
        if copies > 1:
            rows, ids = len(ids), ids.repeat_interleave(copies, dim=0)
            given = {
                name: each if each is None or len(each) != rows else each.repeat_interleave(copies, dim=0)
                for name, each in given.items()
            }
        options: dict[str, Any] = {
            "max_new_tokens": config.new_tokens(ids.shape[1], self.config.max_position_embeddings),
            "sampling": config.sampling(ids.shape[1]),
            "stop": ends_by(ends_with(config.stops(), tokenizer), stopping_criteria),
            "cache_dtype": config.cache_dtype,
            "static_cache": config.static_cache,
        }
        asked_for = bool(config.output_scores), bool(config.output_logits)
        scores = KeptScores(*asked_for) if config.return_dict_in_generate else None
        cache = past_key_values
        together = len(ids) == 1 or not config.ends()
        if cache is None and scores is not None and together and stands_before(given["attention_mask"]):
            cache = KVCache.of(self.config, ids.shape[1] + options["max_new_tokens"], config.cache_dtype)
        if assistant_model is None and not config.prompt_lookup_num_tokens:
            options |= {"processor": in_turn(logits_processor), "record": scores, "streamer": streamer, "cache": cache}
            made = generate(self, ids, **{**given, **options})
            return made if scores is None else scores.beside(made, made.shape[1] - ids.shape[1], cache)
        if logits_processor or scores is not None or cache is not None:
            raise OnlyInTransformersError(
                "drafts are checked together: logits_processor, return_dict_in_generate and past_key_values go without"
            )
        drafter = drafter_of(self, assistant_model, config.prompt_lookup_num_tokens, options["sampling"])
        mask = given.pop("attention_mask")
        if any(each is not None for each in given.values()) or not (mask is None or bool(mask.all())):
            raise OnlyInTransformersError(
                "drafts are for one prompt without padding, and positions and types that are its own"
            )
        steady = streamer is None and stopping_criteria is None  # others' functions, which may do anything
        made_here = stream_with_drafts(self, ids, drafter, steady=steady, **options)
        return collect(ids.to(self.device), made_here, streamer)

    def settings(self, generation_config: Any, asked: Mapping[str, Any]) -> GenerationConfig:
        """What `generate` is to do: as asked, as `generation_config` says, as the model's own settings say.

        Raises RequestError for what is not done here.
        """
        config = self.generation_config
        if generation_config is not None:
            config = config.but(GenerationConfig.of(generation_config))
        stated = GenerationConfig.of(asked)
        config = config.unset(name for name, value in asked.items() if value is None).but(stated)
        with locate("the model's generation settings"):
            config.require_possible()
        return config

    def _beginning(self, config: GenerationConfig) -> int:
        """The token that stands before a text."""
        begin = self.config.bos_token_id if config.bos_token_id is None else config.bos_token_id
        if begin is None:
            raise RequestError("there is no prompt, and no bos_token_id for a text to begin with: give input_ids")
        return begin


class GPTNeoForSequenceClassification(PreTrainedModel, SequenceClassifier):
    """One label, or several, or a number, for a whole text: read off its last token."""


class GPTNeoForTokenClassification(PreTrainedModel, TokenClassifier):
    """A label for each token."""


class GPTNeoForQuestionAnswering(PreTrainedModel, QuestionAnswerer):
    """Where in a text an answer starts and ends."""


@cpu_by_default()
def load(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    attn_implementation: str = "sdpa",
    activations: str = "exact",
    mmap: bool = True,
    progress: Progress = SILENT,
) -> tuple[GPTNeoForCausalLM, Tokenizer]:
    """A language model and its tokenizer, from a folder or by id on the hub; None is the bundled model.

    Arguments and errors are `load_model`'s.
    """
    with open_checkpoint(source, revision=revision, mmap=mmap, progress=progress) as checkpoint:
        tokenizer = Tokenizer.from_folder(folder_of(checkpoint))
        model = read_model(
            checkpoint,
            GPTNeoForCausalLM,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            activations=activations,
            progress=progress,
        )
    return model, tokenizer


def load_tokenizer(source: str | Path | None = None, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of a hub id without its weights. Raises CheckpointError where there is none."""
    return Tokenizer.from_pretrained(source, revision=revision)
