"""InputValues: how often each value occurs among the inputs of linears, from which one static range is found for all.

    counts [65536]: of values, each by the sixteen bits of its nearest bfloat16    minimum, maximum: exact
With `group`, what is counted is the largest magnitude of each group of so many channels, which has a scale of its own.
Why bfloat16: a table of all of them is half a megabyte whatever the range, no value must be seen before it is known, and
2^-9 of a value is less than any range is found to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 20  # values counted at once
N_CODES = 1 << 16


@dataclass(frozen=True)
class Histogram:
    """values [n], rising, float32; counts [n], int64, of each; minimum and maximum as they were."""

    values: Tensor
    counts: Tensor
    minimum: float
    maximum: float


class InputValues:
    """Owns its tables; `update` with every batch, then read the `histogram`."""

    def __init__(self, group: int | None = None) -> None:
        self.n_tokens = 0
        self._group = group
        self._counts = torch.zeros(N_CODES, dtype=torch.int64)
        self._minimum, self._maximum = 0.0, 0.0
        self.is_finite = True  # until NaN or infinity is seen

    def update(self, x: Tensor) -> None:
        """Take in x [..., in]."""
        rows = x.detach().reshape(-1, x.shape[-1])  # [tokens, in]
        for chunk in rows.split(max(1, CHUNK // rows.shape[1])) if len(rows) else ():
            self._take(chunk.float())

    def _take(self, x: Tensor) -> None:
        """x [tokens, in], float32."""
        if self._group is not None:
            x = x.unflatten(1, (-1, self._group)).abs().amax(-1)  # [tokens, groups]
        self.n_tokens += len(x)
        least, most = (float(end) for end in x.aminmax())
        self.is_finite &= -torch.inf < least and most < torch.inf  # no comparison with NaN holds
        self._minimum, self._maximum = min(self._minimum, least), max(self._maximum, most)
        codes = x.to(torch.bfloat16).contiguous().view(torch.int16).int().flatten().cpu() + N_CODES // 2
        self._counts += torch.bincount(codes, minlength=N_CODES)

    def histogram(self) -> Histogram:
        """What was seen, value by value; 0 lies between minimum and maximum."""
        assert self.is_finite, "NaN and infinity have no place in a range"
        codes = self._counts.nonzero().flatten()
        values = (codes - N_CODES // 2).to(torch.int16).view(torch.bfloat16).float()  # [n]
        order = values.argsort()
        codes, values = codes[order], values[order]
        return Histogram(values, self._counts[codes], self._minimum, self._maximum)
