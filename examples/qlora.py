"""Train an adapter on a base model in 4 bits, as QLoRA does.

pip install bitsandbytes
python examples/qlora.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import malora


def main() -> None:
    """Train on a few sentences, then save the adapter."""
    parser = argparse.ArgumentParser(description="Train an adapter on a base model in 4 bits.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder of the base model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", default="results/local/example-qlora", help="folder for the trained adapter")
    options = parser.parse_args()

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=four_bits, dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(base)  # also enables gradient checkpointing
    model = get_peft_model(base, malora.METHODS["malora"](num_experts=4, r=4, lora_alpha=8, d=8)).train()
    optimizer = torch.optim.AdamW(malora.parameter_groups(model, lr=1e-3), weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    batch = tokenizer(["What is 2 + 3? 5", "What is 4 + 4? 8"], return_tensors="pt").to(model.device)

    for step in range(options.steps):
        outputs = model(**batch, labels=batch["input_ids"])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {outputs.loss:.3f}, balance loss {outputs.aux_loss:.3f}")
    model.save_pretrained(options.output)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
