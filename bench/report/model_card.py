"""The model card of a saved adapter, written from its run's record."""

from __future__ import annotations

import json
from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from bench.experiments.methods import title_of
from bench.records.schema import Record, TaskScore
from bench.report import markdown
from tasks import MIXTURES, TASKS

# What the built-in bases are made of, and under which licence.
BUILT_IN_BASES = {"tiny": (None, "apache-2.0"), "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
IMPORT = "import malora  # registers the tuner with PEFT; without it PEFT does not know the adapter's type\n"
OF_PEFT = ("lora", "dora")  # methods that PEFT loads by itself
LICENCE = "The adapter follows the licences of its base model and of its training data. Check both before you use it."


def model_card(record: Record, commit: str | None) -> str:
    """Return the card as Markdown with the hub's metadata in front.

    Args:
        record: A complete run's record.
        commit: Commit of the base model on the hub; None for a built-in model or a folder.
    """
    config, title = record.config, title_of(record.config.method)
    origin, licence = BUILT_IN_BASES.get(config.model, (None, None))
    data = ModelCardData(
        base_model=config.model if commit else origin,
        library_name="peft",
        license=licence,
        pipeline_tag="text-generation",
        tags=sorted({"malora", "peft", config.method, *MIXTURES[config.mixture].tasks}),
    )
    sections = [
        f"# {title} on {config.mixture}",
        f"An adapter for the base model {_base(record, commit)}, trained on the mixture `{config.mixture}` by "
        "malora's benchmark ([MALoRA](https://arxiv.org/abs/2410.22782), Mixture of Asymmetric Low-Rank Adaptation).",
        "## Load it",
        f"```bash\npip install malora  # or, from a checkout of its repository: pip install .\n```\n\n"
        f"```python\n{_program(record, commit)}```",
        "## Scores",
        _scores(record.test or {}),
        "A score is lm-eval's mean over the test items in percent, ± half of its 95% interval. One run does not show "
        "the variation between seeds.",
        "## Training",
        _settings(record),
        "## Licence",
        LICENCE,
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _base(record: Record, commit: str | None) -> str:
    config = record.config
    if commit:
        return f"[{config.model}](https://huggingface.co/{config.model}) at commit `{commit}`"
    origin, _ = BUILT_IN_BASES.get(config.model, (None, None))
    made_of = f", a 4-bit copy of [{origin}](https://huggingface.co/{origin}) converted to bfloat16" if origin else ""
    return f"`{config.model}` (`{config.model_hash[:12]}`{made_of})"


def _program(record: Record, commit: str | None) -> str:
    """Return a Python program that loads the adapter."""
    model = record.config.model
    ours = "" if record.config.method in OF_PEFT else IMPORT
    if commit:
        base = f'AutoModelForCausalLM.from_pretrained("{model}", revision="{commit}")'
    elif model in BUILT_IN_BASES:
        ours += "from bench.models.base import prepare  # in a checkout of malora: makes the base model\n"
        base = f'AutoModelForCausalLM.from_pretrained(prepare("{model}").path)'
    else:
        base = f'AutoModelForCausalLM.from_pretrained("{model}")  # the folder of the base model'
    return (
        f"{ours}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\nbase = {base}\n"
        'model = PeftModel.from_pretrained(base, "this-folder-or-repository")\n'
    )


def _scores(scores: Mapping[str, TaskScore]) -> str:
    body = [
        [TASKS[task].title, score.metric, f"{100 * score.value:.1f}" + _half_interval(score), str(score.n)]
        for task, score in scores.items()
    ]
    return markdown.table(body, ["task", "metric", "score", "items"], ["left", "left", "right", "right"])


def _half_interval(score: TaskScore) -> str:
    return "" if score.stderr is None else f" ± {196 * score.stderr:.1f}"


def _settings(record: Record) -> str:
    config, versions = record.config, record.provenance.packages
    commit = record.provenance.commit
    values = {
        "method": config.method,
        "options": json.dumps(config.method_options),
        "learning rate": config.learning_rate,
        "epochs": config.epochs,
        "examples per batch": config.batch_size,
        "seed": config.seed,
        "prompt format": config.format,
        "steps": record.train.steps if record.train else None,
        "trainable parameters": f"{record.parameters.trainable:,}" if record.parameters else None,
        "record": record.id,
        "code": commit and f"commit {commit}" + (" with changes" if record.provenance.dirty else ""),
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions
        ),
    }
    rows = [[name, markdown.code(value)] for name, value in values.items() if value is not None]
    if not record.complete:
        rows.insert(0, ["**cut short**", "`max_steps` or `max_items`: the scores measure nothing"])
    return markdown.table(rows, ["setting", "value"], ["left", "left"])
