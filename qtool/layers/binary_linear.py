"""BinaryLinear: a linear layer whose weights have one bit each, but for some columns, while their scales learn.

    W^ = r1 r2ᵀ ⊙ (alpha sign(W - mu) + mu)      mu, alpha, r1 [out, 1]    r2 [1, columns]    sign(0) = 1
    mu: the mean of each row, alpha: mean |W - mu|, the scale of least squared error; r1 = r2 = 1 at first
over the columns that are not salient; those that are have weights of their own, which r1 and r2 leave alone.
As codes in 0 and 1:  W^ = scale (code - zero) r2,  scale = 2 alpha r1,  zero = (alpha - mu) / (2 alpha).
Source: Zhao et al. 2025, arXiv:2502.13179 (PTQ1.61). Differs: alpha is mean |W - mu|, of which its mean |W| is the case mu = 0.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.codebook import NEARLY_ZERO
from qtool.formats.integer import Params
from qtool.formats.scheme import ActivationScheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor, Salient, assemble
from qtool.layers.quant_linear import snap_inputs

BINARY = WeightScheme(bits=1, symmetric=False, zero_dtype="float16", scale_dtype="float16")
FLATTEST = 2.0**-10  # least alpha in units of mu: zero points then lie where float16 still has steps of 1/4


class BinaryLinear(nn.Module):
    """Stands where a linear stood while its block is tuned; `quantized` tells what it has come to."""

    def __init__(self, W: Tensor, bias: Tensor | None, salient: Salient | None, activations: ActivationScheme | None) -> None:
        """W [out, in], float32."""
        super().__init__()
        self.bias = bias
        self._salient, self._activations = salient, activations
        self._rest = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)  # [in]
        if salient is not None:
            self._rest[salient.columns.long()] = False
        w = W[:, self._rest]  # [out, columns]
        self._whole = W.clone()  # [out, in]; its binary columns are never read
        if salient is not None:
            self._whole[:, ~self._rest] = salient.tensor.dequantize()
        self._mu = w.mean(1, keepdim=True)  # [out, 1]
        self._signs = torch.where(w >= self._mu, 1.0, -1.0)  # [out, columns]
        self._least = (FLATTEST * self._mu.abs()).clamp(min=NEARLY_ZERO)  # [out, 1]
        self.alpha = nn.Parameter((w - self._mu).abs().mean(1, keepdim=True))
        self.r1 = nn.Parameter(torch.ones_like(self._mu))
        self.r2 = nn.Parameter(torch.ones_like(w[:1]))
        self.clamp()

    def clamp(self) -> None:
        """Bring every parameter back to where it may be: scales are positive."""
        with torch.no_grad():
            self.alpha.clamp_(min=self._least)
            self.r1.clamp_(min=FLATTEST)

    def weight_values(self) -> Tensor:
        """W^ [out, in], float32; gradients reach alpha, r1 and r2."""
        binary = self.r1 * self.r2 * (self.alpha * self._signs + self._mu)  # [out, columns]
        return self._whole.masked_scatter(self._rest, binary)

    def forward(self, x: Tensor) -> Tensor:
        if self._activations is not None:
            x = x + (snap_inputs(x, self._activations) - x).detach()
        return F.linear(x, self.weight_values().to(x.dtype), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The weights as they are now."""
        params = Params((2 * self.alpha * self.r1).unsqueeze(-1), ((self.alpha - self._mu) / (2 * self.alpha)).unsqueeze(-1))
        base = assemble((self._signs > 0).float(), params, BINARY, BINARY.grid)
        column_scale = torch.ones_like(self._whole[0]).masked_scatter(self._rest, self.r2)  # [in]
        return replace(base, column_scale=column_scale.half(), salient=self._salient)
