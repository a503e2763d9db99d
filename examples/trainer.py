"""Train a MALoRA adapter with `transformers.Trainer`.

The base model is a small Llama with random weights, so that nothing is downloaded. Replace it, and the random tokens,
by your own:

    python examples/trainer.py --steps 20
"""

import argparse

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import malora


def main() -> None:
    """Train, then save the adapter."""
    parser = argparse.ArgumentParser(description="Train a MALoRA adapter with transformers.Trainer.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-trainer", help="folder for the trained adapter")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    # The defaults are the paper's sizes, for a model with 7 billion parameters. This model is small, so is its adapter.
    adapter = malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8)
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    texts = torch.randint(0, 100, (32, 32))
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    # Routers learn faster here than the experts, and B faster than the other factors (LoRA+).
    groups = malora.parameter_groups(model, lr=1e-3, router_lr=1e-2, lora_plus_ratio=4)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[malora.RouterCallback()],  # logs the balance loss, and how evenly routers spread their tokens
    )
    trainer.train()
    trainer.save_model()
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
