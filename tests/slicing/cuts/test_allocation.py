"""Allocation: against exhaustive search, on hulls, within the budget, for each width of the stream."""

from itertools import product

import pytest

from slicegpt_fast import InputError
from slicegpt_fast.slicing.cuts.allocation import Cost, Cut, allocate
from slicegpt_fast.slicing.cuts.curve import Curve, total

FIXED = Cost(4)
WHOLE = Curve((10,), (0.0,))  # the stream stays
CONVEX = (
    Cut(Curve((8, 6, 4, 2), (0, 0.1, 0.5, 2)), Cost(3)),
    Cut(Curve((8, 6, 4, 2), (0, 0.3, 0.9, 1.6)), Cost(3)),
    Cut(Curve((6, 4, 2), (0, 0.05, 0.35)), Cost(5, 2)),
)
BUMPY = (
    Cut(Curve((8, 6, 4, 2), (0, 0.4, 0.5, 2)), Cost(3)),
    Cut(Curve((8, 6, 4, 2), (0, 0.9, 0.8, 1.6)), Cost(2)),
    Cut(Curve((6, 4, 2), (0, 0.3, 0.35)), Cost(5, 2)),
    Cut(Curve((9, 6, 3), (0.2, 0.1, 0.35)), Cost(1)),
)


def stored(cuts, sizes, width, fixed):
    return fixed.at(width) + sum(cut.cost.at(width) * size for cut, size in zip(cuts, sizes, strict=True))


def exhaustive(cuts, budget, width=10) -> float:
    """The lowest predicted loss of all sizes that meet the budget."""
    return min(
        sum(cut.curve.loss(size) for cut, size in zip(cuts, sizes, strict=True))
        for sizes in product(*(cut.curve.sizes for cut in cuts))
        if stored(cuts, sizes, width, FIXED) <= budget
    )


@pytest.mark.parametrize("cuts", [CONVEX, BUMPY])
def test_no_other_sizes_lose_less_at_the_hulls_vertices_and_little_less_between(cuts):
    least, most = (stored(cuts, [cut.curve.sizes[end] for cut in cuts], 10, FIXED) for end in (-1, 0))
    edge = max(
        lower - upper
        for cut in cuts
        for (_, lower), (_, upper) in zip(cut.curve.hull(), cut.curve.hull()[1:], strict=False)
    )
    exact = 0
    for budget in range(least, most + 1):
        (found,) = allocate(cuts, WHOLE, FIXED, budget)
        assert found.stored == stored(cuts, found.sizes, 10, FIXED) <= budget
        losses = [cut.curve.loss(size) for cut, size in zip(cuts, found.sizes, strict=True)]
        assert found.loss == pytest.approx(sum(losses))
        best = exhaustive(cuts, budget)
        assert best <= found.loss + 1e-12 <= best + edge + 1e-9
        exact += found.loss <= best + 1e-12
    assert exact > 0.6 * (most + 1 - least)


def test_at_a_price_where_an_edge_ends_the_allocation_is_optimal():
    """Whatever it stores, nothing that stores as little is better: so it is at every vertex on the way."""
    vertices = sorted(
        (
            ((lower - upper) / (cut.cost.at(10) * (large - small)), cut.cost.at(10) * (large - small))
            for cut in BUMPY
            for (small, lower), (large, upper) in zip(cut.curve.hull(), cut.curve.hull()[1:], strict=False)
        ),
        reverse=True,
    )
    budget = stored(BUMPY, [cut.curve.sizes[-1] for cut in BUMPY], 10, FIXED)
    for _, cost in vertices:
        budget += cost
        (found,) = allocate(BUMPY, WHOLE, FIXED, budget)
        assert found.loss == pytest.approx(exhaustive(BUMPY, budget))


def test_widths_of_the_stream_are_compared():
    stream = Curve((10, 8, 5), (0.0, 0.02, 3.0))
    found = allocate(CONVEX, stream, FIXED, 500)
    assert [allocation.width for allocation in found] != [10, 8, 5]
    assert sorted(allocation.width for allocation in found) == [5, 8, 10]
    assert [allocation.loss for allocation in found] == sorted(allocation.loss for allocation in found)
    for allocation in found:
        assert allocation.stored == stored(CONVEX, allocation.sizes, allocation.width, FIXED) <= 500
        assert allocation.loss - stream.loss(allocation.width) == pytest.approx(
            exhaustive(CONVEX, 500, allocation.width), abs=0.31
        )


def test_a_budget_that_only_a_narrow_stream_meets():
    stream = Curve((10, 5), (0.0, 3.0))
    least = stored(CONVEX, (2, 2, 2), 5, FIXED)
    (found,) = allocate(CONVEX, stream, FIXED, least)
    assert (found.width, found.sizes, found.stored) == (5, (2, 2, 2), least)
    with pytest.raises(InputError, match=rf"budget of {least - 1} stored .* the smallest sizes store {least}"):
        allocate(CONVEX, stream, FIXED, least - 1)


def test_everything_stays_where_the_budget_allows_it():
    (found,) = allocate(CONVEX, WHOLE, FIXED, 10**6)
    assert found.sizes == (8, 8, 6)
    assert found.loss == 0


def test_the_hull():
    assert Curve((8, 6, 4, 2), (0, 0.1, 0.5, 2)).hull() == [(2, 2), (4, 0.5), (6, 0.1), (8, 0)]
    assert Curve((8, 6, 4, 2), (0, 0.9, 0.8, 1.6)).hull() == [(2, 1.6), (4, 0.8), (8, 0)]
    assert Curve((9, 6, 3), (0.2, 0.1, 0.35)).hull() == [(3, 0.35), (6, 0.1)]
    assert Curve((9, 6, 3), (0.1, 0.1, 0.1)).hull() == [(3, 0.1)]
    assert Curve((9,), (0.0,)).hull() == [(9, 0)]


def test_coarser_sizes_and_sums():
    curve = Curve((10, 8, 6, 4, 2), (0, 1, 2, 3, 4))
    assert curve.every(4) == Curve((10, 8, 4), (0, 1, 3))
    assert curve.every(2, least=5) == Curve((10, 8, 6), (0, 1, 2))
    assert total([curve, curve, curve]) == Curve(curve.sizes, (0, 3, 6, 9, 12))
