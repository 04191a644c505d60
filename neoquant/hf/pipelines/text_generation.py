"""Texts continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from neoquant.errors import RequestError
from neoquant.generation.config import GenerationConfig
from neoquant.hf.pipelines.base import Pipeline
from neoquant.loading.pretrained import GPTNeoForCausalLM, PreTrainedModel

_OWN = ("return_full_text", "return_tensors", "return_text", "prefix", "stop_sequence", "skip_special_tokens")
_PASSED_ON = ("streamer", "generation_config")


class TextGenerationPipeline(Pipeline):
    """For each text a list of `{"generated_text": ...}`, one for each of `num_return_sequences`.

    Options: `return_full_text` (True: the prompt as well), `return_tensors` (True: `generated_token_ids` instead of
    text), `prefix` in front of each text, `stop_sequence`, `skip_special_tokens` (True), `streamer`, and all of
    `generate`'s. Unless these or the folder's generation_config.json say otherwise, 256 new tokens are sampled with
    temperature 0.7, as transformers does.
    """

    model_class: ClassVar[type[PreTrainedModel]] = GPTNeoForCausalLM

    def _check(self, options: Mapping[str, Any]) -> None:
        self._generation(options)
        if options.get("return_tensors") and any(name in options for name in ("return_text", "return_full_text")):
            raise RequestError("return_tensors gives no text, so return_text and return_full_text cannot be given too")

    def _generation(self, options: Mapping[str, Any]) -> GenerationConfig:
        """What `generate` is to do: as asked, as the folder asks, or by the task's defaults."""
        asked = {name: value for name, value in options.items() if name not in (*_OWN, *_PASSED_ON)}
        if "stop_sequence" in options:
            asked["stop_strings"] = options["stop_sequence"]
        config: GenerationConfig = self.model.settings(options.get("generation_config"), asked)
        length = {} if config.max_length is not None else {"max_new_tokens": 256}
        chance = {"do_sample": True, "temperature": 0.7} if config.do_sample is not False else {}
        filler = {"pad_token_id": self.tokenizer.pad_token_id}
        return GenerationConfig.of({**length, **chance, **filler}).but(config)

    def _run(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        for text in inputs:
            if not isinstance(text, str):
                raise RequestError(
                    f"text-generation continues texts, not what is of type {type(text).__name__}: GPT-Neo has no chats"
                )
        prompts = [options.get("prefix", "") + text for text in inputs]
        # Without a token there is nothing to go on from: an empty text begins with the end of another.
        encoded = [self.tokenizer.prompt_ids(prompt) for prompt in prompts]
        ids, mask = self._collate(encoded, "left")
        config = self._generation(options)
        out = self.model.generate_as(
            config, ids, {"attention_mask": mask}, tokenizer=self.tokenizer, streamer=options.get("streamer")
        )
        rows = out.view(len(inputs), -1, out.shape[1]).cpu()
        return [
            [self._record(row, ids.shape[1], text, options) for row in copies]
            for text, copies in zip(inputs, rows, strict=True)
        ]

    def _record(self, row: torch.Tensor, prompt: int, text: str, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("return_tensors"):
            return {"generated_token_ids": row.tolist()}
        new = self.tokenizer.decode(row[prompt:], skip_special_tokens=options.get("skip_special_tokens", True))
        return {"generated_text": text + new if options.get("return_full_text", True) else new}
