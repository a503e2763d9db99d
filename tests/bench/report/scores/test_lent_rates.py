"""Records whose tuned learning rates count for other runs."""

from bench.report.scores.selection import records_frame, records_of, records_that_lend_rates
from bench.runs.setting import make_run_config
from tests.bench.records.test_store import make


def test_tasks_lend_domains_their_rates_whatever_the_format(setting):
    """Unless tasks were tuned in the domains' own."""

    def run(**changes):
        one = make(0)
        one.config = make_run_config(setting, "malora", 0).replace(**changes)
        return one

    like = run(mixture="inter-open", format="cloze").config
    lent, own = run(mixture="intra", learning_rate=1e-3), run(mixture="intra", format="cloze")
    of_domains, other = run(mixture="inter-open"), run(mixture="intra", max_length=7)

    def lenders(records, like):
        return records_of(records_that_lend_rates(records_frame(records), like))

    assert lenders([lent, of_domains, other], like) == [lent]
    assert lenders([lent, of_domains, own, other], like) == [own]
    assert lenders([lent, own], lent.config) == [lent]
    own_task = run(mixture="a-task-of-a-file", learning_rate=2e-3)  # no registered mixture in this process
    assert lenders([lent, own_task], lent.config) == [lent]
    assert lenders([lent, own_task, own], like) == [own]
