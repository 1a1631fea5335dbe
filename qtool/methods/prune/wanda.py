"""Wanda: prune by weight magnitude times the norm of the input it meets, without any update of the rest.

    score S_ij = |W_ij| ‖X_j‖₂      W, S [out, in], compared within a row or within M neighbours of a row
    ‖X_j‖₂² = tokens · H_jj         H [in, in] mean of x xᵀ; the factor is the same for all j and left away
Source: Sun et al. 2023, arXiv:2306.11695, equation 1 and section 3. Differs: X is what the linears before it in the block,
pruned already, give; with true_sequential: false what the block as it was gives, as in the paper's code and llmcompressor.
For: nearly as good as SparseGPT at half the zeros, in a fraction of its time.
Costs: one pass through the model.
"""

from collections.abc import Callable

from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.sparsity import SharedSparsity, choose
from qtool.options import Sequential
from qtool.registry import Method


class WandaOptions(SharedSparsity, Sequential):
    """Options of Wanda."""


def wanda(W: Tensor, stats: LayerStats, options: WandaOptions, note: Callable[[str], None]) -> Tensor:
    """W [out, in] float32, pruned entries zero; raises QtoolError where columns do not fit the pattern."""
    scores = W.abs()  # [out, in]
    if stats.n_tokens == 0:
        note("no calibration token reached it; pruned by magnitude")
    else:
        scores *= stats.hessian().diagonal().sqrt()
    return W.masked_fill(choose(scores, options), 0)


METHOD = Method(run=wanda, options=WandaOptions, scope="linear", needs=("hessian",), rowwise=True)
