"""Outliers: single weights of a matrix beside its codes, in compressed sparse rows.

    w^[o, columns[k]] += values[k]   for starts[o] <= k < starts[o + 1]
    starts [out + 1] int32    columns [n] int16 below 32768 columns, else int32    values [n] float16 or bfloat16
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outliers:
    """What is added to n weights of a matrix."""

    starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, added: Tensor, chosen: Tensor, dtype: torch.dtype = torch.float16) -> "Outliers":
        """Those of `added` [out, in] that are chosen [out, in], rounded to dtype."""
        rows, columns = chosen.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(added))  # [out]
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return cls(starts, columns.to(index_dtype(added.shape[1])), added[rows, columns].to(dtype))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all three tensors."""
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"starts": self.starts, "columns": self.columns, "values": self.values}

    def add_to(self, w: Tensor) -> Tensor:
        """w [out, in] with the values added."""
        rows = torch.repeat_interleave(torch.arange(len(w), device=w.device), self.starts.diff())  # [n]
        return w.index_put((rows, self.columns.long()), self.values.to(w.dtype), accumulate=True)

    def rows(self, start: int, stop: int) -> "Outliers":
        """Those of rows start .. stop - 1, which become the first."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        return Outliers(self.starts[start : stop + 1] - first, self.columns[first:last], self.values[first:last])


def index_dtype(columns: int) -> torch.dtype:
    """What the number of a column is stored in."""
    return torch.int16 if columns <= torch.iinfo(torch.int16).max + 1 else torch.int32


def stored_size(count: int, out: int, columns: int) -> int:
    """Bytes of `count` outliers of a matrix [out, columns], values in 16 bits."""
    return (out + 1) * torch.int32.itemsize + count * (index_dtype(columns).itemsize + torch.float16.itemsize)
