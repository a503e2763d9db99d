import pytest

from bench.records.regressions import Figure
from bench.regress.figures import LOOK_AT, compare
from tests.bench.regress.conftest import make_regressions

LOSS = Figure(value=1.5, same=0, elsewhere=0.01, other_base=0.5)
TIME = Figure(value=1.0, same=0.2, elsewhere=0.5, other_base=0.5, only_above=True)
HASH = Figure(value="a", same=0, elsewhere=0, other_base=0)


def moved(committed, found, parts=("training", "layer", "data"), is_same=True):
    return {one.name: one for one in compare(committed, found, parts, is_same) if one.has_moved}


@pytest.mark.parametrize(
    ("found", "base", "is_same", "has_moved"),
    [
        (1.5, "base", True, False),
        (1.50001, "base", True, True),  # to the digit
        (1.509, "base", False, False),
        (1.489, "base", False, True),
        (1.1, "another", False, False),
        (2.1, "another", False, True),
        (float("nan"), "base", False, True),
    ],
)
def test_the_bound_of_a_number_depends_on_machine_and_base(found, base, is_same, has_moved):
    committed = make_regressions(training_loss=LOSS, training_base=Figure(value="base"))
    result = moved(committed, {"training.loss": found, "training.base": base}, is_same=is_same)
    assert ("training.loss" in result) == has_moved


def test_a_time_may_fall_but_not_rise():
    committed = make_regressions(layer_a=TIME, layer_b=TIME, layer_c=TIME)
    assert set(moved(committed, {"layer.a": 0.1, "layer.b": 1.19, "layer.c": 1.21})) == {"layer.c"}


def test_a_text_must_be_equal_unless_it_has_no_bound():
    committed = make_regressions(data_a=HASH, data_b=Figure(value="b", same=0))
    assert set(moved(committed, {"data.a": "x", "data.b": "x"})) == {"data.a", "data.b"}
    assert set(moved(committed, {"data.a": "x", "data.b": "x"}, is_same=False)) == {"data.a"}


def test_a_figure_that_one_side_lacks_has_moved():
    committed = make_regressions(data_a=HASH, training_loss=LOSS)
    result = moved(committed, {"data.new": "x", "training.status": "failed"}, parts=("data", "training"))
    assert set(result) == {"data.a", "data.new", "training.loss", "training.status"}
    assert moved(committed, {"data.a": "a"}, parts=("data",)) == {}, "figures of other parts were not measured"


def test_the_report_says_what_moved_by_how_much_and_where_to_look():
    committed = make_regressions(training_malora_gradient_router_norm=LOSS)
    (one,) = moved(committed, {"training.malora.gradient.router.norm": 0.0}, is_same=False).values()
    first, second = one.text().splitlines()
    assert "training.malora.gradient.router.norm: 0, committed 1.5, bound: ± 0.01" in first
    assert "malora/routing.py" in second


def test_every_part_has_a_place_to_look_at():
    from bench.regress.cli import PARTS

    assert {beginning.partition(".")[0] for beginning in LOOK_AT} == set(PARTS)
