"""Train an adapter with a loop of your own and accelerate, on one process or several.

pip install accelerate
python examples/accelerate_loop.py
torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import malora


def main() -> None:
    """Train on sums of two numbers, then save the adapter."""
    parser = argparse.ArgumentParser(description="Train an adapter with a loop of your own and accelerate.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder of the base model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-accelerate", help="folder for the trained adapter")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)  # all processes start with the same adapter
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    model = get_peft_model(base, malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8)).train()
    optimizer = torch.optim.AdamW(malora.parameter_groups(model, lr=1e-3), weight_decay=0.0)
    texts = [f"What is {a} + {b}? {a + b}" for a in range(10) for b in range(10)] * options.steps
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(texts, batch_size=4, shuffle=True))

    micro_batches = iter(loader)
    for step in range(options.steps):
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = tokenizer(next(micro_batches), return_tensors="pt", padding=True).to(accelerator.device)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            with accelerator.accumulate(model):
                outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
                accelerator.backward(outputs.loss)  # divides it, and the balance loss in it, by the micro-batches
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {outputs.loss:.3f}, balance loss {outputs.aux_loss:.3f}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
