"""The base model of the tiny profile: a Llama of about a million parameters, trained here on procedural text."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks import procedural

RECIPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "steps": 300,
    "rows": 16,
    "length": 96,
    "learning_rate": 3e-3,
    "answer_weight": 4.0,
}


def recipe_hash() -> str:
    """Of what the model is made by: the recipe and the code here and in `tasks.procedural`."""
    sources = [Path(module).read_text() for module in (__file__, procedural.__file__)]
    return hashlib.sha256(json.dumps([RECIPE, sources]).encode()).hexdigest()


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; white space is between words and nothing else."""
    words = ["<pad>", "<unk>", "<eos>", *procedural.VOCABULARY]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def train_base(folder: Path) -> None:
    """Train the model and save it with its tokenizer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the model, must not depend on the machine's cores
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tokenizer()
        model = _train(words)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _train(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    sizes = {name: RECIPE[name] for name in list(RECIPE)[:4]}
    config = LlamaConfig(
        **sizes, vocab_size=len(words), max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    steps, rows, length = RECIPE["steps"], RECIPE["rows"], RECIPE["length"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["learning_rate"], steps, pct_start=0.1)
    rng, stream = random.Random(1), []
    answer = words.convert_tokens_to_ids("Answer:")
    for _ in tqdm(range(steps), desc="training the tiny base", unit="step", disable=None, file=sys.stderr):
        while len(stream) < rows * length:
            stream += [*words(procedural.pretraining_text(rng))["input_ids"], words.eos_token_id]
        ids = torch.tensor(stream[: rows * length]).view(rows, length)
        stream = stream[rows * length :]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(rows, -1)
        weight = torch.where(ids[:, :-1] == answer, RECIPE["answer_weight"], 1.0)
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
