"""The dense meaning of the column intervals, for checks of what attention sees.

B rows of the batch, S key columns, R query rows.
"""

from __future__ import annotations

import numpy as np


def dense_mask(intervals: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Visible pairs: bool [B, R, S], True where query row r may attend to key column j.

    ``intervals`` int [B, 1, S, 4] holds (LTS, LTE, UTS, UTE) per column; row r is hidden from it when
    LTS <= r < LTE or UTS <= r < UTE. ``rows`` int [R] are the absolute query rows; default all S of them.
    """
    lower_start, lower_end, upper_start, upper_end = np.moveaxis(np.asarray(intervals)[:, 0, None], -1, 0)
    rows = np.arange(intervals.shape[2]) if rows is None else np.asarray(rows)
    rows = rows[None, :, None]
    below = (lower_start <= rows) & (rows < lower_end)
    above = (upper_start <= rows) & (rows < upper_end)
    return ~(below | above)
