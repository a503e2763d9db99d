"""A language model for lm-eval that scores label positions only and generates with CUDA graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bench.evaluate.generate import generate
from bench.runtime.logits import label_positions_only

# Label positions whose logits are there at once: for a vocabulary of 49,152, and with their logarithms, 6 GiB.
MAX_LABELS = 16_384


class _LanguageModel(HFLM):
    """HFLM, but for how it asks for likelihoods and texts: the same for a fraction of the time and memory.

    HFLM takes the logarithm of the logits of every position in the model's precision, and waits for the device several
    times for each choice. Here the head runs where a choice's tokens are to be predicted, in float32, so that logits
    that differ do not tie, and each batch is waited for once. Texts are tokenized once in the life of the process.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known = _tokenized_by(self.tokenizer.backend_tokenizer.to_str())

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        key = (string, args, tuple(options.items()))
        if key not in self.known:
            self.known[key] = super().tok_encode(string, *args, **options)
        return self.known[key]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the continuation's log-likelihood, and if it is the likeliest."""
        asked = defaultdict(list)  # input -> (number of the request, continuation); choices of one token share theirs
        for number, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            asked[tuple(whole[:-1])].append((number, continuation[-self.max_length :]))
        inputs = sorted(asked, key=len)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for chunk in self._chunks(inputs, lambda ids: sum(len(continuation) for _, continuation in asked[ids])):
            width = len(chunk[-1])
            places = [
                (number, row, len(ids) - len(continuation) + place, token)
                for row, ids in enumerate(chunk)
                for number, continuation in asked[ids]
                for place, token in enumerate(continuation)
            ]
            number, row, column, target = torch.tensor(places).T.contiguous().to(self.device)
            ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in chunk], device=self.device)
            with label_positions_only(self.model, row, column, in_float32=True):
                logits = self._model_call(ids)
            likelihood = -F.cross_entropy(logits, target, reduction="none")
            likeliest = logits.argmax(-1) == target
            for n, value, is_likeliest in zip(*(x.tolist() for x in (number, likelihood, likeliest)), strict=True):
                answers[n] = (answers[n][0] + value, answers[n][1] and is_likeliest)
        return answers

    def _chunks(self, inputs: list[tuple], labels: Callable[[tuple], int]) -> Iterator[list[tuple]]:
        """Runs of the inputs, of at most a batch and MOST_LABELS labels."""
        chunk, total = [], 0
        for ids in inputs:
            if chunk and (len(chunk) == self.batch_size or total + labels(ids) > MAX_LABELS):
                yield chunk
                chunk, total = [], 0
            chunk.append(ids)
            total += labels(ids)
        if chunk:
            yield chunk

    def generate_until(self, requests: list[Instance], *args: Any, **options: Any) -> list[str]:
        """What is written after each request's context, up to the first of its stop strings."""
        answers = [""] * len(requests)
        alike = defaultdict(list)  # stop strings and most tokens -> numbers of the requests
        for number, request in enumerate(requests):
            how = request.args[1]
            alike[tuple(how["until"]), how["max_gen_toks"]].append(number)
        for (stop, max_new_tokens), numbers in alike.items():
            prompts = [self.tok_encode(requests[n].args[0])[-(self.max_length - max_new_tokens) :] for n in numbers]
            written = generate(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=self.generation_batch_size,
                end=[self.eot_token_id],
                stopped=lambda tokens, stop=stop: _until(stop, text := self.tok_decode(tokens)) != text,
            )
            for n, tokens in zip(numbers, written, strict=True):
                answers[n] = _until(stop, self.tok_decode(tokens))
        return answers


def _until(stop: tuple[str, ...], text: str) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


@cache
def _tokenized_by(tokenizer: str) -> dict[tuple, list[int]]:
    """What a tokenizer, given as its own JSON, has made of texts in this process."""
    return {}
