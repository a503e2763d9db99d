"""Greedy decoding of many prompts at once.

A small model's decoding step is bound by launching its kernels, so on a GPU it is captured as a CUDA graph, once for a
batch and length of cache, and replayed; and by reading the weights, so batches are large. Prompts are sorted by length
and padded on the left. Whether rows are done is asked every `CHECK_EVERY` steps, because the host has to wait for the
answer; those that are compute on, unread, until their batch is.

Shapes: B batch, W width of the prompts, C length of the cache, G tokens to generate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import StaticCache

from bench.runtime.logits import label_positions_only
from malora.backbone.cuda_graphs import can_capture, capture

CHECK_EVERY = 16
WIDTHS = 64  # prompts are padded to a multiple of it, so that batches share a cache and its graph


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end: Collection[int],
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """What the model, in eval mode and with SDPA for its attention, writes after each prompt, token by likeliest token.

    Args:
        prompts: token ids, at least one each.
        most: tokens to write at most.
        batch_size: prompts at a time; the cache is of that many, and as long as the longest of them and `most`.
        end: ids that end a text; they are not in the result.
        stopped: whether tokens so far hold all that is wanted; those after may or may not be in the result.

    Returns:
        Token ids by prompt, in the order given.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: list[list[int]] = [[]] * len(prompts)
    decoder = None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = len(prompts[rows[-1]])
        shape = (len(rows), longest + -longest % WIDTHS, max_new_tokens)
        if decoder is None or decoder.shape != shape:
            decoder = None  # its cache goes before the next one comes
            decoder = _Decoder(model, shape)
        decoder.start([prompts[i] for i in rows])
        texts, done = [[] for _ in rows], [False] * len(rows)
        for count in range(1, max_new_tokens + 1):
            if count % CHECK_EVERY == 0 or count == max_new_tokens:
                for row, tokens in enumerate(decoder.written[:, :count].tolist()):
                    if not done[row]:
                        ends = [tokens.index(token) for token in end if token in tokens]
                        texts[row] = tokens[: min(ends, default=count)]
                        done[row] = bool(ends) or stopped(texts[row])
                if all(done):
                    break
            if count < max_new_tokens:
                decoder.step()
        for row, text in zip(rows, texts, strict=True):
            written[row] = text
    return written


class _Decoder:
    """One batch's state, in tensors that stay where they are, so that a graph can be replayed on them."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        rows, width, max_new_tokens = self.shape = shape
        self.model, self.width = model, width
        device = model.device
        assert model.config._attn_implementation == "sdpa", "the masks are made for it"
        self.cache = StaticCache(config=model.config, max_cache_len=width + max_new_tokens)
        self.mask = torch.zeros(rows, 1, 1, width + max_new_tokens, dtype=torch.bool, device=device)  # [B, 1, 1, C]
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)  # [B, 1], the last one written
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)  # [B, 1], among those of its row
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # [1], of tokens written
        self.written = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)  # [B, G]
        self.graph = None

    def start(self, prompts: list[list[int]]) -> None:
        """Read the prompts and write the first token."""
        self._read(prompts)
        if self.graph is None and can_capture(self.model) and self.shape[2] > 1:
            self.graph = capture(self._advance, passes=1)
            self._read(prompts)  # capturing has moved the state on

    def step(self) -> None:
        """Write one more token."""
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def _read(self, prompts: list[list[int]]) -> None:
        device, width = self.token.device, self.width
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, W]
        padding = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]  # [B, 1]
        place = torch.arange(width, device=device)
        valid = place >= padding  # [B, W]
        # What stands in the padding sees itself, since attention to nothing would be NaN; nobody else sees it.
        visible = (place <= place[:, None]) & (valid[:, None] | (place == place[:, None]))  # [B, W, W]
        mask = torch.zeros(len(prompts), 1, width, self.mask.shape[-1], dtype=torch.bool, device=device)
        mask[:, 0, :, :width] = visible
        self.cache.reset()
        self.mask.zero_()[:, 0, 0, :width] = valid
        last = torch.full((len(prompts),), width - 1, device=device)
        with label_positions_only(self.model, torch.arange(len(prompts), device=device), last):
            logits = self._forward(ids, mask, (place - padding).clamp(min=0))  # [B, vocabulary]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.copy_(width - padding)
        self.written.zero_()[:, 0] = self.token[:, 0]
        self.count.fill_(1)

    def _advance(self) -> None:
        self.mask.index_fill_(3, self.count + (self.width - 1), True)  # where the cache takes the token that is read
        logits = self._forward(self.token, self.mask, self.position)
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.written.index_copy_(1, self.count, self.token)
        self.position += 1
        self.count += 1

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        on_gpu = ids.device.type == "cuda"
        # Copies of weights that autocast keeps would be a graph's own.
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            return self.model(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=self.cache, use_cache=True
            ).logits
