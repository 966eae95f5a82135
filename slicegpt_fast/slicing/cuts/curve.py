"""A curve: the predicted increase of the loss per token, f(size), for every size that an axis may be cut to."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """What it costs to keep less.

    Attributes:
        sizes: the sizes that may be kept, descending; the first is the full one.
        losses: the predicted increase of the loss per token, in nats, at each size.
    """

    sizes: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, size: int) -> float:
        """Return the predicted increase at one of ``sizes``."""
        return self.losses[self.sizes.index(size)]

    def every(self, step: int, *, least: int = 1) -> "Curve":
        """Return the curve of the sizes that are multiples of ``step`` and at least ``least``, and of the full one."""
        points = zip(self.sizes, self.losses, strict=True)
        chosen = [
            (size, loss) for size, loss in points if size == self.sizes[0] or (size % step == 0 and size >= least)
        ]
        return Curve(tuple(size for size, _ in chosen), tuple(loss for _, loss in chosen))

    def hull(self) -> list[tuple[int, float]]:
        """Return the vertices (size, loss) of the lower convex hull, by ascending size.

        They are the points that are best at some price per unit of size: from one to the next the loss falls, and ever
        more slowly.
        """
        vertices: list[tuple[int, float]] = []
        for point in zip(reversed(self.sizes), reversed(self.losses), strict=True):
            while len(vertices) > 1 and _slope(vertices[-2], vertices[-1]) >= _slope(vertices[-2], point):
                vertices.pop()
            vertices.append(point)
        while len(vertices) > 1 and vertices[-1][1] >= vertices[-2][1]:
            vertices.pop()
        return vertices


def total(curves: Sequence[Curve]) -> Curve:
    """Return the curve of several cuts that keep one size, as the experts of a layer do: the sum of theirs."""
    sums = map(sum, zip(*(curve.losses for curve in curves), strict=True))
    return Curve(curves[0].sizes, tuple(float(loss) for loss in sums))


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
