"""The mixtures and tasks that are registered."""

from tasks import MIXTURES, TASKS
from tasks.domains import OPEN
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L


def test_mixtures_with_open_stand_ins_have_a_note_for_tables():
    with_note = [name for name, mixture in MIXTURES.items() if mixture.note]
    assert with_note == ["inter-open", *(f"inter-open/{domain.name}" for domain in OPEN)]
    assert "Not the paper's training data" in MIXTURES["inter-open"].note and MIXTURES["inter"].size == 30_000


def test_metrics_of_the_inter_domain_tasks():
    metrics = [TASKS[name].metric for name in MIXTURES["inter-open"].tasks]
    assert metrics == [None, PASS, LAST_NUMBER, None, None, None, ROUGE_L]
