import itertools
import math

import pytest

from wake2vec.schedule import learning_rate_at


def rates(warmup_steps: int, max_steps: int) -> list[float]:
    return [
        learning_rate_at(step, learning_rate=5e-4, warmup_steps=warmup_steps, max_steps=max_steps)
        for step in range(1, max_steps + 1)
    ]


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    assert rates(4, 10)[:4] == [5e-4 * step / 4 for step in (1, 2, 3, 4)]


def test_first_step_after_the_warm_up_has_the_full_rate() -> None:
    assert rates(4, 10)[4] == 5e-4


def test_cosine_is_at_half_the_rate_in_its_middle() -> None:
    assert math.isclose(rates(150, 3150)[150 + 1500], 2.5e-4)


def test_rate_falls_after_the_warm_up_and_the_last_step_still_teaches() -> None:
    falling = rates(150, 3000)[150:]
    assert all(earlier > later for earlier, later in itertools.pairwise(falling))
    assert 0 < falling[-1] < 1e-9


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert rates(0, 3) == pytest.approx([5e-4, 5e-4 * 0.75, 5e-4 * 0.25])


def test_a_run_may_end_inside_its_warm_up() -> None:
    assert rates(8, 4) == [5e-4 * step / 8 for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("step", [0, 11])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(AssertionError, match=r"outside 1\.\.10"):
        learning_rate_at(step, learning_rate=5e-4, warmup_steps=2, max_steps=10)
