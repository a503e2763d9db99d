"""A language model for lm-eval that computes logits at label positions only.

It generates with CUDA graphs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bench.evaluate.answer_journal import Recall, compute_always
from bench.evaluate.generate import Texts, generate
from bench.runtime.logits import label_positions_only
from bench.runtime.tokens import encode_texts, split_label

# Label positions per forward pass. With a vocabulary of 49,152 their logits and log-probabilities take 6 GiB.
MAX_LABELS = 16_384

Tokens = tuple[int, ...]


class LabelPositionLM(HFLM):  # type: ignore[misc, unused-ignore]  # lm_eval has no types
    """HFLM with the same answers for a fraction of its time and memory.

    HFLM computes log-probabilities at every position, in the precision of the model, and waits for the device several
    times per choice. This class runs the output layer at label positions only, in float32, so that different logits do
    not tie. It waits once per batch. Each text is tokenized once per process.

    Attributes:
        generation_batch_size: Answers generated at a time.
        recall: Returns the answers to a batch, from its inputs and a function that computes them.
        answered_more: Called after each batch with the number of requests that it answers, and whether they were
            computed now.
    """

    generation_batch_size = 64
    recall: Recall
    answered_more: Callable[[int, bool], None]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recall = compute_always
        self.answered_more = lambda count, is_new: None
        self.token_cache = _token_cache(self.tokenizer.backend_tokenizer.to_str())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Tokenize a text as training does; texts seen before come from the cache.

        With `add_special_tokens` or other options it is lm-eval's function.
        """
        if add_special_tokens is not None or options:
            encoded: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
            return encoded
        if string not in self.token_cache:
            (self.token_cache[string],) = encode_texts(self.tokenizer, [string])
        return self.token_cache[string]

    def count_label_tokens(self, prompt: str, label: str) -> int:
        """Return the number of tokens that a label adds to its prompt."""
        return len(self._split(prompt, label)[1])

    def _split(self, prompt: str, label: str) -> tuple[list[int], list[int]]:
        return split_label(self.tok_encode(prompt), self.tok_encode(prompt + label))

    def loglikelihood(self, requests: list[Instance], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of each request's continuation of its context.

        lm-eval's own would move spaces from the end of a context to its continuation, which training does not.
        """
        return self._loglikelihood_tokens([(request.args, *self._split(*request.args)) for request in requests])

    def answer_loglikelihoods(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """Return the log-likelihood of each answer after its prompt.

        Args:
            texts: Prompts with their answers.
        """
        requests: list[tuple[Any, list[int], list[int]]] = [(pair, *self._split(*pair)) for pair in texts]
        return [value for value, _ in self._loglikelihood_tokens(requests)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Compute log-likelihoods of continuations.

        Args:
            requests: Per request its texts, and the tokens of context and continuation.
            args: Ignored; of HFLM.
            options: Ignored; of HFLM.

        Returns:
            Per request the log-likelihood, and if greedy decoding would give this continuation.
        """
        # By input, numbers of the requests and their continuations: choices of one token share their input.
        continuations: dict[Tokens, list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.max_length + 1) :]
            continuations[tuple(ids[:-1])].append((number, continuation[-self.max_length :]))
        inputs = sorted(continuations, key=len)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for chunk in self._chunks(inputs, lambda ids: sum(len(tokens) for _, tokens in continuations[ids])):
            labels = [
                (number, row, len(ids) - len(continuation) + place, token)
                for row, ids in enumerate(chunk)
                for number, continuation in continuations[ids]
                for place, token in enumerate(continuation)
            ]
            numbers = [number for number, *_ in labels]
            places = [place for _, *place in labels]
            compute = partial(self._label_likelihoods, chunk, places)
            count = sum(len(continuations[ids]) for ids in chunk)
            values, greedy = self._answer(["likelihood", chunk, places], count, compute)
            for n, value, is_greedy in zip(numbers, values, greedy, strict=True):
                answers[n] = (answers[n][0] + value, answers[n][1] and is_greedy)
        return answers

    def _answer(self, inputs: Any, count: int, compute: Callable[[], Any]) -> Any:
        """Recall or compute the answers to a batch of `count` requests, and say so to `answered_more`."""
        is_new = False

        def compute_and_note() -> Any:
            nonlocal is_new
            is_new = True
            return compute()

        answers = self.recall(inputs, compute_and_note)
        self.answered_more(count, is_new)
        return answers

    def _label_likelihoods(self, chunk: list[Tokens], places: list[list[int]]) -> tuple[list[float], list[bool]]:
        """Compute the log-probabilities of tokens in one forward pass.

        Args:
            chunk: Inputs, the longest one last.
            places: Per token its input's number, its position there, and the token.

        Returns:
            Per token its log-probability, and if it is the most probable one.
        """
        width = len(chunk[-1])
        row, column, target = torch.tensor(places).T.contiguous().to(self.device)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in chunk], device=self.device)
        with label_positions_only(self.model, row, column, in_float32=True):
            logits = self._model_call(padded)
        log_probability = -F.cross_entropy(logits, target, reduction="none")
        return log_probability.tolist(), (logits.argmax(-1) == target).tolist()

    def _chunks(self, inputs: list[Tokens], count_labels: Callable[[Tokens], int]) -> Iterator[list[Tokens]]:
        """Split the inputs into chunks of at most a batch.

        A chunk has at most MAX_LABELS labels, or is one input.
        """
        chunk: list[Tokens] = []
        total = 0
        for ids in inputs:
            labels = count_labels(ids)
            if chunk and (len(chunk) == self.batch_size or total + labels > MAX_LABELS):
                yield chunk
                chunk, total = [], 0
            chunk.append(ids)
            total += labels
        if chunk:
            yield chunk

    def generate_until(self, requests: list[Instance], *args: Any, **options: Any) -> list[str]:
        """Generate a continuation of each request's context.

        A continuation goes up to the first of the request's stop strings. One of white space alone, such as a line
        break, ends no continuation that has not begun.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)  # numbers of requests by their options
        for number, request in enumerate(requests):
            how = request.args[1]
            groups[tuple(how["until"]), how["max_gen_toks"]].append(number)
        for (stop, max_new_tokens), numbers in groups.items():
            prompts = [self.tok_encode(requests[n].args[0])[-(self.max_length - max_new_tokens) :] for n in numbers]
            generated = generate(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=self.generation_batch_size,
                end=[self.eot_token_id],
                stopped=self._has_any(stop),
                around_batch=partial(self._answer_batch, [list(stop), max_new_tokens]),
            )
            for n, tokens in zip(numbers, generated, strict=True):
                answers[n] = _until(stop, self.tok_decode(tokens))
        return answers

    def _answer_batch(self, options: list[Any], prompts: Texts, decode: Callable[[], Texts]) -> Texts:
        texts: Texts = self._answer(["generation", options, prompts], len(prompts), decode)
        return texts

    def _has_any(self, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
        """Return a test of tokens for any of the stop strings."""

        def has_any(tokens: list[int]) -> bool:
            text = self.tok_decode(tokens)
            return _end(stop, text) < len(text)

        return has_any


def _until(stop: tuple[str, ...], text: str) -> str:
    """Cut the text before the first stop string."""
    return text[: _end(stop, text)]


def _end(stop: tuple[str, ...], text: str) -> int:
    """Return the place of the first stop string, or the length of the text."""
    begin = len(text) - len(text.lstrip())
    places = [text.find(s, 0 if s.strip() else begin) for s in stop]
    return min((place for place in places if place >= 0), default=len(text))


@cache
def _token_cache(tokenizer_json: str) -> dict[str, list[int]]:
    """Return the cache of tokenized texts of a tokenizer, one per process."""
    return {}
