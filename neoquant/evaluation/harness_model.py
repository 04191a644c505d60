"""A model of neoquant as lm-evaluation-harness asks for one. The one file that imports lm_eval at its top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from neoquant.errors import DataError, RequestError
from neoquant.evaluation.accumulator import TokenScores
from neoquant.evaluation.answers import Answer, Answers, digest
from neoquant.evaluation.corpus import Window
from neoquant.evaluation.scoring import Model, batch_limits, batches, score_batches
from neoquant.evaluation.shared_context import SharedContext, by_context
from neoquant.model.base import Network
from neoquant.progress import Progress
from neoquant.sizes import plural


class HarnessModel(TemplateLM):
    """Log-likelihoods of continuations; nothing is generated.

    What is read and scored is what lm_eval's own `hf` model reads and scores: context and continuation are tokenized
    together, and cut on the left to the tokens that the model has positions for. On a CPU, a long context with
    several continuations is read once. `number` tells the answers of several
    models apart.
    """

    def __init__(
        self, model: Model, tokenizer: Any, *, context: int, answers: Answers, number: int, progress: Progress
    ) -> None:
        super().__init__()
        self.model, self.tokens = model, tokenizer
        self.context, self.answers, self.number, self.progress = context, answers, number, progress

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a continuation without a context. Raises RequestError where the tokenizer has no such token."""
        first = self.tokens.bos_token_id
        first = self.tokens.eos_token_id if first is None else first
        if first is None:
            raise RequestError("the tokenizer has neither a first nor an end-of-text token to put before a text")
        return int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokens.encode(string, add_special_tokens=False)
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        raise RequestError("perplexity of whole texts is measured with --suite, not with --task")

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        raise RequestError("tasks that need generated text cannot be run")

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # spaces alone are moved into the continuation, and leave no context: then it is as if there were none
        requests = [(text, context or [self.prefix_token_id], rest) for text, context, rest in requests]
        keys = [f"{self.number}:{digest(context, continuation)}" for _, context, continuation in requests]
        new = {
            key: self._window(text, context, continuation)
            for key, (text, context, continuation) in zip(keys, requests, strict=True)
            if self.answers.get(key) is None
        }
        self._answer(list(new), list(new.values()))
        found = [self.answers.get(key) for key in keys]
        return [(-answer[0], answer[1]) for answer in found if answer is not None]

    def _window(self, text: tuple[str, str], context: list[int], continuation: list[int]) -> Window:
        if not 0 < len(continuation) <= self.context:
            raise DataError(
                f"the continuation {text[1][:60]!r} has {plural(len(continuation), 'token')}; 1 to {self.context} "
                "can be scored"
            )
        ids = torch.tensor((context + continuation)[-(self.context + 1) :], dtype=torch.int32)
        vocabulary = int(self.model.config.vocab_size)
        if int(ids.max()) >= vocabulary:
            raise RequestError(
                f"the tokenizer gives token {int(ids.max())}, but the model knows {vocabulary} tokens: "
                "is it the model's own tokenizer?"
            )
        return Window(0, ids, len(continuation))

    def _answer(self, keys: Sequence[str], windows: Sequence[Window]) -> None:
        if not windows:
            return
        limits = batch_limits(self.model.device)
        # Launches of a GPU take longer than what a shared context saves.
        shares = isinstance(self.model, Network) and self.model.device.type == "cpu"
        shared = list(by_context(windows, limits.positions)) if shares else []
        rest = sorted(set(range(len(windows))) - {number for batch in shared for number in batch})
        alone = [[rest[number] for number in b] for b in batches([windows[n] for n in rest], limits.positions)]
        with self.progress.task("scoring", total=sum(window.scored for window in windows)) as advance:
            for model, work in ((SharedContext(self.model), shared), (self.model, alone)):
                chosen = ([windows[number] for number in batch] for batch in work)
                found = score_batches([model], chosen, limits.rows, advance)
                for batch, (scores,) in zip(work, found, strict=True):
                    self._keep([keys[number] for number in batch], [windows[number].scored for number in batch], scores)

    def _keep(self, keys: Sequence[str], lengths: list[int], scores: TokenScores) -> None:
        nats, hits = torch.split(scores.nats, lengths), torch.split(scores.hit, lengths)
        answers: dict[str, Answer] = {
            key: (float(loss.sum()), bool(hit.all())) for key, loss, hit in zip(keys, nats, hits, strict=True)
        }
        self.answers.add(answers)
