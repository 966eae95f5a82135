"""``covariance_``: accumulate the (uncentred) covariance of token activations, ``acc += X^T X``."""

from torch import Tensor

ROWS_PER_STEP = 4096  # bounds the upcast copy of x to 4096 rows


def covariance_(acc: Tensor, x: Tensor, row_scale: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Add ``X^T X`` to ``acc`` in place, in ``acc``'s precision, where X is the scaled and selected rows of ``x``.

    Args:
        acc: [D, D] accumulator, fp64 or fp32.
        x: [N, D] activations of any floating dtype.
        row_scale: [N] factor of each row, such as the reciprocal norm of the normalised signal.
        mask: [N] bool; rows where it is false count nowhere, whatever they hold.

    Returns:
        ``acc``.
    """
    if mask is not None:
        x = x[mask]
        row_scale = None if row_scale is None else row_scale[mask]
    for start in range(0, x.shape[0], ROWS_PER_STEP):
        rows = x[start : start + ROWS_PER_STEP].to(acc.dtype)
        if row_scale is not None:
            rows = rows * row_scale[start : start + ROWS_PER_STEP, None].to(acc.dtype)
        acc.addmm_(rows.T, rows)
    return acc
