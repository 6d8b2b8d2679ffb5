"""Kernel: the clipped step of one weight in the words of Triton, which compiles it, or interprets it in tests.

Every compact entry is read and written once, and of the weight the selected entries alone.
"""

from __future__ import annotations

# This file is read by whoever collects all files of the package; only a fused step needs the language.
try:
    import triton.language as tl
except ImportError:
    tl = None


def advance(
    weight: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    hessian: tl.tensor,
    step: tl.tensor,
    indices: tl.tensor,
    finite: tl.tensor,
    lr: tl.tensor,
    keep: tl.tensor,
    weight_decay: tl.tensor,
    share: tl.tensor,
    rho: tl.tensor,
    eps: tl.tensor,
    clip: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    SELECTS_ROWS: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_IS_POINTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Advance a block of the compact entries; the blocks are numbered row by row.

    Args:
        weight: Pointer to the weight, a matrix of any strides.
        grad: Pointer to the compact gradient, contiguous float32. Shape: `(num_rows, num_columns)`.
        exp_avg: Pointer to the momentum, contiguous, as `grad`.
        hessian: Pointer to the curvature, contiguous, as `grad`.
        step: Pointer to the counter of steps, float32.
        indices: Pointer to the selected rows or columns of the weight, int64; None: all.
        finite: Pointer to a byte: where it is zero nothing changes; None: it is one.
        lr: Step size, or a pointer to it.
        keep: One minus the product of step size and decay, where `lr` is a number.
        weight_decay: Decay, which is read where `lr` is a pointer.
        share: One minus the decay of the momentum.
        rho: Curvature scale.
        eps: Floor of the denominator.
        clip: Bound of the ratio.
        num_rows: Of the compact entries.
        num_columns: Of the compact entries.
        row_stride: Of the weight, in entries.
        column_stride: Of the weight, in entries.
        SELECTS_ROWS: Whether `indices` are rows instead of columns.
        DECAYS: Whether there is a decay.
        LR_IS_POINTER: Whether `lr` is read here.
        BLOCK_ROWS: Of a block; a power of two.
        BLOCK_COLUMNS: Of a block; a power of two.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    # In 64 bits, because the entries of a large weight are more than 32 bits count.
    rows = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    limit = num_rows
    if finite is None:
        tl.store(step, tl.load(step) + 1.0, mask=program == 0)
    else:
        passes = tl.load(finite)
        tl.store(step, tl.load(step) + passes.to(tl.float32), mask=program == 0)
        # No row is below zero.
        limit = num_rows * passes.to(tl.int64)
    touched = (rows < limit)[:, None] & (columns < num_columns)[None, :]
    place = rows[:, None] * num_columns + columns[None, :]
    if indices is not None:
        if SELECTS_ROWS:
            rows = tl.load(indices + rows, mask=rows < num_rows, other=0)
        else:
            columns = tl.load(indices + columns, mask=columns < num_columns, other=0)
    target = weight + rows[:, None] * row_stride + columns[None, :] * column_stride
    # As torch.lerp, whose two forms are exact at their own ends.
    g = tl.load(grad + place, mask=touched, other=0.0)
    m = tl.load(exp_avg + place, mask=touched, other=0.0).to(tl.float32)
    m = tl.where(share < 0.5, m + share * (g - m), g - (g - m) * (1.0 - share))
    # By comparisons, which keep NaN as clamp does.
    floor = rho * tl.load(hessian + place, mask=touched, other=0.0).to(tl.float32)
    ratio = tl.div_rn(m, tl.where(floor < eps, eps, floor))
    ratio = tl.where(ratio < -clip, -clip, tl.where(ratio > clip, clip, ratio))
    w = tl.load(target, mask=touched, other=0.0).to(tl.float32)
    if LR_IS_POINTER:
        rate = tl.load(lr)
        if DECAYS:
            w = w * (1.0 - rate * weight_decay).to(tl.float32)
        w = w - ratio * rate.to(tl.float32)
    else:
        if DECAYS:
            w = w * keep
        w = w - ratio * lr
    tl.store(exp_avg + place, m.to(exp_avg.dtype.element_ty), mask=touched)
    tl.store(target, w.to(weight.dtype.element_ty), mask=touched)
