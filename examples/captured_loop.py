"""Train a MALoRA adapter with captured steps: forward and backward as CUDA graphs, in a loop of your own.

On a CPU the same program runs every pass as usual. The base model is a small Llama with random weights, so that nothing
is downloaded. Replace it, and the random tokens, by your own:

    python examples/captured_loop.py --steps 20
"""

import argparse

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora


def main() -> None:
    """Train, then save the adapter."""
    parser = argparse.ArgumentParser(description="Train a MALoRA adapter with steps captured as CUDA graphs.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-captured", help="folder for the trained adapter")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    adapter = malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8)
    model = get_peft_model(LlamaForCausalLM(config), adapter).to(device).train()
    malora.optimize_backbone(model)
    optimizer = torch.optim.AdamW(malora.parameter_groups(model, lr=1e-3), fused=True)
    step = malora.capture_step(model)

    for number in range(options.steps):
        micro_batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 100, (2, 2, 16))]
        losses = step(micro_batches, scale=1 / len(micro_batches))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            balance = malora.balance_loss(model)
        print(f"step {number + 1}: loss {torch.stack(losses).mean():.3f}, balance loss {balance:.3f}")

    model.save_pretrained(options.output)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
