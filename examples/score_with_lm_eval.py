"""Score a trained adapter with the LM Evaluation Harness.

pip install 'lm-eval[hf]'
python examples/score_with_lm_eval.py --adapter results/local/example-sft --tasks arc_easy --limit 100
"""

import argparse

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import malora  # noqa: F401  # so that PEFT knows the adapter's type


def main() -> None:
    """Score the adapter on some tasks and print the table."""
    parser = argparse.ArgumentParser(description="Score a trained adapter with the LM Evaluation Harness.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder of the base model")
    parser.add_argument("--adapter", required=True, help="folder of the trained adapter")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"], help="names of tasks")
    parser.add_argument("--task-folder", help="folder with the YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, help="score only this many items per task")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=options.tasks,
        task_manager=TaskManager(include_path=options.task_folder),
        limit=options.limit,
    )
    print(make_table(results))


if __name__ == "__main__":
    main()
