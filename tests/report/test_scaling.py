"""The cost model: that it finds the link behind measured times, and what it predicts."""

import pytest

from ddp_lib import UserError, World, run_ranks
from ddp_lib.report.scaling import (
    Link,
    Step,
    efficiency,
    fit_link,
    measure_all_reduce,
    predict_step_s,
)

MB = 2**20
LINK = Link(latency_s=1e-4, bytes_per_s=1e9)
STEP = Step(compute_s=0.3, backward_s=0.2, gradient_bytes=100 * MB)


def test_a_ring_sends_twice_the_tensor_less_a_share_of_each_rank():
    assert LINK.all_reduce_s(10**9, 1) == 0
    assert LINK.all_reduce_s(10**9, 2) == pytest.approx(2 * 1e-4 + 1)
    assert LINK.all_reduce_s(10**9, 4) == pytest.approx(6 * 1e-4 + 1.5)
    assert Link(0, 1e9).all_reduce_s(10**9, 10**6) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_fit_finds_the_link(ranks):
    sizes = [4**power for power in range(4, 13)]
    link = fit_link({size: [LINK.all_reduce_s(size, ranks)] for size in sizes}, ranks)
    assert link.latency_s == pytest.approx(LINK.latency_s)
    assert link.bytes_per_s == pytest.approx(LINK.bytes_per_s)


def test_noise_moves_the_fit_by_no_more_than_itself():
    sizes = [4**power for power in range(4, 13)]
    noise = [1.1 if power % 2 else 0.9 for power in range(len(sizes))]
    runs = {}
    for size, factor in zip(sizes, noise, strict=True):
        middle = factor * LINK.all_reduce_s(size, 2)
        runs[size] = [100 * middle, middle, middle / 2]  # the median counts
    link = fit_link(runs, 2)
    assert link.latency_s == pytest.approx(LINK.latency_s, rel=0.15)
    assert link.bytes_per_s == pytest.approx(LINK.bytes_per_s, rel=0.15)


def test_the_fit_keeps_to_what_is_possible():
    assert fit_link({1000: [1e-6], 2000: [3e-6], 4000: [9e-6]}, 2).latency_s == 0
    with pytest.raises(UserError, match="take the same time: measure larger tensors"):
        fit_link({1000: [2e-4], 2000: [1e-4]}, 2)
    for times, ranks in (({1000: [1e-4]}, 2), ({1000: [1e-4], 2000: [2e-4]}, 1)):
        with pytest.raises(UserError, match="fix no line"):
            fit_link(times, ranks)


def test_communication_hides_behind_backward():
    endless = Link(0, 1e15)
    assert predict_step_s(STEP, LINK, 1) == STEP.compute_s
    assert predict_step_s(STEP, endless, 64) == pytest.approx(STEP.compute_s)
    with_overlap = predict_step_s(STEP, LINK, 2)
    without = predict_step_s(STEP, LINK, 2, overlap=False)
    assert without == pytest.approx(0.3 + 4 * LINK.all_reduce_s(25 * MB, 2))
    # Four buckets: only the last, ready when backward ends, is in nobody's shadow.
    assert with_overlap == pytest.approx(0.3 + LINK.all_reduce_s(25 * MB, 2))


def test_a_slow_link_is_never_hidden():
    slow = Link(0, 1e6)
    sent = slow.all_reduce_s(100 * MB, 2)
    # The first bucket starts when a quarter of backward is done; then the link is always busy.
    assert predict_step_s(STEP, slow, 2) == pytest.approx(0.1 + 0.05 + sent)


def test_the_last_bucket_may_be_small():
    step = Step(0.3, 0.2, 30 * MB)
    assert predict_step_s(step, LINK, 2) == pytest.approx(0.3 + LINK.all_reduce_s(5 * MB, 2))
    assert predict_step_s(Step(0.3, 0.2, 1000), LINK, 2) == pytest.approx(0.3 + LINK.all_reduce_s(1000, 2))


def test_efficiency_falls_with_ranks_and_rises_with_accumulation():
    by_ranks = [efficiency(STEP, LINK, ranks) for ranks in (1, 2, 8, 64, 1024)]
    assert by_ranks[0] == 1
    assert by_ranks == sorted(by_ranks, reverse=True)
    parts = [efficiency(STEP.accumulated(n), LINK, 64) for n in (1, 2, 4)]
    assert parts == sorted(parts)
    assert predict_step_s(STEP.divided(4), LINK, 4) < predict_step_s(STEP, LINK, 4)


def measure(sizes: list[int]) -> dict[int, list[float]]:
    with World.join(log=lambda line: None) as world:
        return measure_all_reduce(world, sizes, repeats=3)


@pytest.mark.ranks
def test_all_reduces_are_measured_alike_on_every_rank():
    sizes = [1024, 4 * MB]
    on_0, on_1 = run_ranks(measure, 2, sizes)
    assert on_0 == on_1
    assert [*on_0] == sizes and all(len(runs) == 3 and min(runs) > 0 for runs in on_0.values())
