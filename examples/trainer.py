"""Train a MALoRA adapter with `transformers.Trainer`.

The base model is a small Llama with random weights, so that nothing is downloaded. Replace it, and the random tokens,
by your own:

    python examples/trainer.py --steps 20
"""

import argparse
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import malora

BALANCE = 0.01  # weight of the load-balancing loss, as in the paper


class BalancedTrainer(Trainer):
    """A Trainer whose loss has the routers' load-balancing loss in it."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the language-modelling loss plus the weighted balance loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + BALANCE * malora.balance_loss(model)
        return (loss, outputs) if return_outputs else loss


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
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = BalancedTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": text, "labels": text} for text in texts]
    )
    trainer.train()
    trainer.save_model()
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
