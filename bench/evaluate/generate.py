"""Greedy decoding of many prompts at once.

1. A decoding step of a small model is bound by launching its kernels. On a GPU it is captured as a CUDA graph, once per
   batch size and cache length, and replayed.
2. It is also bound by reading the weights, so batches are large.
3. Prompts are sorted by length and padded on the left.
4. The host looks for finished texts every `CHECK_EVERY` steps only, because it has to wait for the device then. A
   finished text is decoded further until the batch ends, and the surplus is dropped.

Shapes:
    B: prompts of a batch
    W: width of the prompts, padding included
    C: length of the cache, W + G
    G: tokens to generate
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from bench.runtime.attention import attention_windows, masks_for
from bench.runtime.logits import label_positions_only
from malora.backbone.cuda_graphs import capture
from malora.backbone.model_state import can_capture

Texts = list[list[int]]  # token ids of each

CHECK_EVERY = 16  # steps between two looks at the tokens
WIDTH_MULTIPLE = 64  # prompts are padded to a multiple of it, so that batches share a cache and its CUDA graph


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    end: Collection[int],
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
    around_batch: Callable[[Texts, Callable[[], Texts]], Texts] = lambda prompts, decode: decode(),
) -> list[list[int]]:
    """Continue each prompt with the most probable token, one after the other.

    Args:
        model: A causal language model of transformers in eval mode, with SDPA or eager attention.
        prompts: Token ids, at least one per prompt.
        max_new_tokens: Maximum tokens to generate per prompt.
        batch_size: Prompts decoded at a time. The cache has this many entries of the longest prompt's length plus
            `max_new_tokens`.
        end: Token ids that end a text. They are not part of the result.
        stopped: Tells from the tokens so far if the text needs no more. The result may have further tokens.
        around_batch: Gets the prompts of each batch and a function that decodes them, and returns their texts.

    Returns:
        Generated token ids, in the order of the prompts.

    Raises:
        UserError: The model's attention takes no masks for a padded batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generated: list[list[int]] = [[]] * len(prompts)
    decoder: _Decoder | None = None

    def decode(batch: Texts) -> Texts:
        nonlocal decoder
        longest = len(batch[-1])
        shape = (len(batch), longest + -longest % WIDTH_MULTIPLE, max_new_tokens)
        if decoder is None or decoder.shape != shape:
            decoder = None  # frees its cache before the next one is allocated
            decoder = _Decoder(model, shape)
        return _decode_batch(decoder, batch, end, stopped)

    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[i] for i in chosen]
        for i, text in zip(chosen, around_batch(batch, partial(decode, batch)), strict=True):
            generated[i] = text
    return generated


def _decode_batch(
    decoder: _Decoder, prompts: list[list[int]], end: Collection[int], stopped: Callable[[list[int]], bool]
) -> list[list[int]]:
    """Decode one batch of the decoder's shape; arguments and result as in `generate`."""
    max_new_tokens = decoder.shape[2]
    decoder.start(prompts)
    texts: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for count in range(1, max_new_tokens + 1):
        if count % CHECK_EVERY == 0 or count == max_new_tokens:
            for b, tokens in enumerate(decoder.generated[:, :count].tolist()):
                if not done[b]:
                    ends = [tokens.index(token) for token in end if token in tokens]
                    texts[b] = tokens[: min(ends, default=count)]
                    done[b] = bool(ends) or stopped(texts[b])
            if all(done):
                break
        if count < max_new_tokens:
            decoder.step()
    return texts


class _Decoder:
    """The state of a batch, in tensors that stay where they are.

    A CUDA graph can therefore be replayed on them.

    Args:
        model: Model to decode with.
        shape: (B, W, G).

    Attributes:
        place: Positions of the cache, [C].
        mask: Positions of the cache that a new token attends to if its layer has no window, [B, 1, 1, C].
        token: Last generated token, [B, 1].
        position: Its position in its text, without padding, [B, 1].
        count: Number of generated tokens, [1].
        generated: Generated tokens, [B, G].
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        B, width, max_new_tokens = self.shape = shape
        self.model, self.width = model, width
        config, device = model.config, next(model.parameters()).device
        assert isinstance(config, PreTrainedConfig), "a model of transformers"
        self.windows = attention_windows(model)
        self.additive_masks = config.get_text_config()._attn_implementation == "eager"
        self.dtype = torch.bfloat16 if device.type == "cuda" else next(model.parameters()).dtype
        length = width + max_new_tokens
        self.cache = StaticCache(config=config, max_cache_len=length)
        # transformers gives layers with a sliding window a cache of the window's length. In a padded batch their
        # entries would be those of other positions than in full layers, so all layers keep the whole text.
        self.cache.layers = [
            StaticLayer(length) if isinstance(layer, StaticSlidingWindowLayer) else layer for layer in self.cache.layers
        ]
        self.place = torch.arange(length, device=device)
        self.mask = torch.zeros(B, 1, 1, length, dtype=torch.bool, device=device)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.generated = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, prompts: list[list[int]]) -> None:
        """Read the prompts and generate the first token."""
        self._read(prompts)
        if self.graph is None and can_capture(self.model) and self.shape[2] > 1:
            self.graph = capture(self._advance, passes=1)
            self._read(prompts)  # capturing has changed the state

    def step(self) -> None:
        """Generate one more token."""
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()

    def _read(self, prompts: list[list[int]]) -> None:
        device, width = self.token.device, self.width
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # [B, W]
        padding = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]  # [B, 1]
        place = self.place[:width]
        valid = place >= padding  # [B, W]
        # Padding attends to itself, because attention over nothing is NaN. No token attends to padding.
        visible = (place <= place[:, None]) & (valid[:, None] | (place == place[:, None]))  # [B, W, W]
        mask = torch.zeros(len(prompts), 1, width, len(self.place), dtype=torch.bool, device=device)
        mask[:, 0, :, :width] = visible
        reset: Callable[[], None] = self.cache.reset
        reset()
        self.mask.zero_()[:, 0, 0, :width] = valid
        last = torch.full((len(prompts),), width - 1, device=device)
        with label_positions_only(self.model, torch.arange(len(prompts), device=device), last):
            logits = self._forward(ids, mask, place, (place - padding).clamp(min=0))  # [B, vocabulary]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.copy_(width - padding)
        self.generated.zero_()[:, 0] = self.token[:, 0]
        self.count.fill_(1)

    def _advance(self) -> None:
        place = self.count + (self.width - 1)  # the cache entry of the token that is read
        self.mask.index_fill_(3, place, True)
        logits = self._forward(self.token, self.mask, place, self.position)
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.generated.index_copy_(1, self.count, self.token)
        self.position += 1
        self.count += 1

    def _forward(self, ids: Tensor, mask: Tensor, place: Tensor, position: Tensor) -> Tensor:
        """Return the logits of some tokens, Q per text.

        Args:
            ids: [B, Q].
            mask: Positions of the cache that they attend to in a layer without a window, [B, 1, Q, C].
            place: Their own positions of the cache, [Q].
            position: Their positions in their texts, [B, Q].
        """

        def windowed(window: int | None) -> Tensor:
            visible = mask if window is None else mask & (place[:, None] - self.place < window)
            if not self.additive_masks:
                return visible
            return torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, float("-inf"))

        device_type = ids.device.type
        # Autocast's cache of cast weights would be allocated in the graph's memory, so it is off.
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda", cache_enabled=False):
            output = self.model(
                input_ids=ids,
                attention_mask=masks_for(self.windows, windowed),
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
            )
        logits: Tensor = output.logits
        return logits
