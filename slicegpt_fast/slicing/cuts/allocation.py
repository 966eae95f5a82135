"""One budget of stored parameters for all cuts: minimise sum f_i(n_i) subject to sum c_i n_i <= budget.

At a price p per stored parameter each cut i takes the size that minimises f_i(n) + p c_i n, a vertex of the lower
convex hull of its curve, and no other sizes that store as little or less have a lower loss. As the price falls, the
edges of all hulls are taken in the order of their slopes, the loss that a stored parameter saves; the first edge that
does not fit sets the price. What is then left of the budget is less than that edge, and goes to whatever step saves
most per parameter among those that fit.

A narrower stream makes everything cheaper, since whatever touches it stores d numbers in place of D: the problem is
solved for each of a few widths d, whose own predicted loss is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.cuts.curve import Curve


@dataclass(frozen=True)
class Cost:
    """Stored parameters: vectors of the stream's width, and single numbers (the biases of readers)."""

    vectors: int
    scalars: int = 0

    def at(self, width: int) -> int:
        """Return the number of parameters stored where the stream has this width."""
        return self.vectors * width + self.scalars


@dataclass(frozen=True)
class Cut:
    """One size to choose: its curve, and what a unit of the size stores (3 vectors for a channel of a gated MLP)."""

    curve: Curve
    cost: Cost


@dataclass(frozen=True)
class Allocation:
    """What a budget buys.

    Attributes:
        width: of the residual stream.
        sizes: of the cuts, in their order.
        stored: the number of stored parameters.
        loss: the predicted increase of the loss per token.
    """

    width: int
    sizes: tuple[int, ...]
    stored: int
    loss: float


def allocate(cuts: Sequence[Cut], stream: Curve, fixed: Cost, budget: int) -> list[Allocation]:
    """Choose the size of every cut, for each width of the stream.

    Args:
        cuts: what there is to choose.
        stream: predicted loss against the stream's width, for the widths to try; the full one alone if it stays.
        fixed: what is stored whatever the sizes are.
        budget: the number of parameters that may be stored.

    Returns:
        The allocations that meet the budget, one per width of the stream, the lowest predicted loss first.

    Raises:
        InputError: the smallest sizes exceed the budget.
    """
    found = [
        _allocate(cuts, width, loss, fixed.at(width), budget)
        for width, loss in zip(stream.sizes, stream.losses, strict=True)
    ]
    fitting = [allocation for allocation in found if allocation.stored <= budget]
    if not fitting:
        least = min(allocation.stored for allocation in found)
        raise InputError(
            f"the budget of {budget} stored parameters cannot be met: the smallest sizes store {least}; raise it, or "
            "cut more axes."
        )
    return sorted(fitting, key=lambda allocation: allocation.loss)


def _allocate(cuts: Sequence[Cut], width: int, loss: float, stored: int, budget: int) -> Allocation:
    """The allocation at one width of the stream, which costs ``loss``; ``stored`` is what the fixed part takes."""
    costs = [cut.cost.at(width) for cut in cuts]
    sizes = [cut.curve.sizes[-1] for cut in cuts]
    left = budget - stored - _dot(costs, sizes)
    edges = [
        ((lower - upper) / (cost * (large - small)), index, cost * (large - small), large)
        for index, (cut, cost) in enumerate(zip(cuts, costs, strict=True))
        for (small, lower), (large, upper) in pairwise(cut.curve.hull())
    ]
    for _, index, cost, size in sorted(edges, key=lambda edge: edge[0], reverse=True):
        if cost > left:
            break
        sizes[index], left = size, left - cost
    while step := _best_step(cuts, costs, sizes, left):
        index, size = step
        sizes[index], left = size, left - costs[index] * (size - sizes[index])
    loss += sum(cut.curve.loss(size) for cut, size in zip(cuts, sizes, strict=True))
    return Allocation(width, tuple(sizes), stored + _dot(costs, sizes), loss)


def _best_step(cuts: Sequence[Cut], costs: list[int], sizes: list[int], left: int) -> tuple[int, int] | None:
    """The cut and its larger size that save the most loss per parameter, of those that the rest of the budget pays."""
    steps = [
        ((cut.curve.loss(size) - loss) / (cost * (larger - size)), index, larger)
        for index, (cut, cost, size) in enumerate(zip(cuts, costs, sizes, strict=True))
        for larger, loss in zip(cut.curve.sizes, cut.curve.losses, strict=True)
        if larger > size and cost * (larger - size) <= left and loss < cut.curve.loss(size)
    ]
    return max(steps)[1:] if steps else None


def _dot(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))
