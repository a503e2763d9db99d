"""Fine-tune a language model with TRL's `SFTTrainer`.

pip install trl
python examples/sft_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import malora


class CapturedSFTTrainer(malora.CaptureMixin, SFTTrainer):
    """Replay forward and backward as CUDA graphs. On a CPU it is SFTTrainer."""


def main() -> None:
    """Train on sums of two numbers, then save the adapter."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model with TRL's SFTTrainer.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder of the base model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-sft", help="folder for the trained adapter")
    options = parser.parse_args()

    sums = [{"prompt": f"What is {a} + {b}?", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    arguments = SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        pad_to_multiple_of=64,  # few shapes, because each is captured
        gradient_checkpointing=False,  # torch's reads the random state, which a graph cannot
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = CapturedSFTTrainer(
        model=options.model,
        args=arguments,
        train_dataset=Dataset.from_list(sums),
        peft_config=malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8),
        callbacks=[malora.RouterCallback()],
    )
    trainer.train()  # SFTTrainer computes a loss of its own, and adds the balance loss of the adapter to it
    trainer.save_model()
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
