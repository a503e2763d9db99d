"""Train a MALoRA adapter with a plain PyTorch loop.

The base model is a small Llama with random weights, so that nothing is downloaded. Replace it, and the random tokens,
by your own:

    python examples/train_adapter.py --steps 20
"""

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora


def make_base() -> LlamaForCausalLM:
    """Return a small Llama with random weights, the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train, print the losses, then save the adapter and load it again."""
    parser = argparse.ArgumentParser(description="Train a MALoRA adapter with a plain PyTorch loop.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-adapter", help="folder for the trained adapter")
    options = parser.parse_args()

    # The defaults are the paper's sizes, for a model with 7 billion parameters. This model is small, so is its adapter.
    model = get_peft_model(make_base(), malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens = torch.randint(0, 100, (4, 32))

    model.train()
    for step in range(options.steps):
        outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()  # the load-balancing loss is in it, with the weight router_aux_loss_coef
        optimizer.step()
        optimizer.zero_grad()
        # The balance loss is 1 for a perfectly even router, and more for an uneven one.
        print(f"step {step + 1}: loss {outputs.loss.item():.3f}, balance loss {outputs.aux_loss.item():.3f}")

    layer, stats = next(iter(malora.router_stats(model).items()))
    print(f"share of the tokens of each expert in {layer}: {[round(share, 2) for share in stats.share]}")

    model.save_pretrained(options.output)
    PeftModel.from_pretrained(make_base(), options.output)
    print(f"saved to {options.output} and loaded again")


if __name__ == "__main__":
    main()
