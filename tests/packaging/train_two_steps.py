"""Training of an adapter for two steps, saving and loading it again.

It needs nothing but malora and its dependencies.
`test_wheel.py` runs this program in an environment without a checkout. It prints the folder of malora.
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=50,
        )
    )


model = get_peft_model(make_base(), malora.METHODS["malora"](r=4, lora_alpha=8, d=8, num_experts=4, lora_dropout=0.0))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
tokens = torch.randint(0, 50, (2, 12))

losses = []
for _ in range(3):  # two steps, and the loss after them
    loss = model(input_ids=tokens, labels=tokens).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert all(torch.isfinite(torch.tensor(losses))), losses
assert losses[2] < losses[0], losses

model.eval()
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    expected = model(input_ids=tokens).logits
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(make_base(), folder).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    assert not torch.equal(make_base().eval()(input_ids=tokens).logits, expected)

print(malora.__path__[0])
