"""Laws of the methods that see one matrix: quantizers, pruners, transforms, factorizations, on correlated inputs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank
from qtool.formats.packing import unpack_codes
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.options import Needs, Options
from qtool.registry import Method

OUT, IN, TOKENS = 24, 96, 400  # `in` is no power of two
SCHEMES = ("w4a16g32", "w3a16g32-asym", "w4a16g32-asymf16", "w8a16", "w2a16g96")
FURTHER = ("nf4g32", "w3a16g8-ic", "w4a16g32-dq")  # what a quantizer may refuse, by a QtoolError


@dataclass(frozen=True)
class Problem:
    """A linear layer with correlated inputs of uneven strength, as real ones are."""

    W: Tensor  # [out, in]
    H: Tensor  # [in, in]
    x: Tensor  # [tokens, in]
    H_out: Tensor  # [out, out]

    def loss(self, changed: Tensor, needs: Needs = ()) -> float:
        """tr((W - Q) H (W - Q)ᵀ) of changed weights Q [out, in]; tr(Hₒ (W - Q) H (W - Q)ᵀ) for who needs Hₒ."""
        E = self.W - changed
        return float(((E @ self.H) * (self.H_out @ E if "output_hessian" in needs else E)).sum())


def linear_problem() -> Problem:
    """The same problem on every call."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=random) * torch.rand(IN, generator=random) ** 2  # [in, in]
    x = torch.randn(TOKENS, IN, generator=random) @ mix  # [tokens, in]
    W = torch.randn(OUT, IN, generator=random)
    g = torch.randn(TOKENS, OUT, generator=random) @ torch.randn(OUT, OUT, generator=random)  # [tokens, out]
    return Problem(W, x.T @ x / TOKENS, x, g.T @ g / TOKENS)


def statistics(method: Method, options: Options, problem: Problem) -> LayerStats | None:
    """What the driver would hand to the method."""
    needs = method.needed(options)
    if not needs:
        return None
    stats = LayerStats(IN, needs)
    stats.update(problem.x)
    return stats.of_output(problem.H_out)


# ---- quantize ----


def run_quantize(method: Method, scheme: str, problem: Problem) -> QuantizedTensor:
    options = method.options.model_validate({"scheme": scheme})
    stats, asked = statistics(method, options, problem), Scheme.model_validate(scheme)
    result = method.run(problem.W.clone(), stats, method.asked_of(asked), options, lambda text: None)
    result = result[0] if method.chooses_inputs else result
    assert isinstance(result, QuantizedTensor), f"{method.key} returns {type(result).__name__}, must be QuantizedTensor"
    return result


def results(method: Method) -> Iterator[tuple[str, Problem, QuantizedTensor]]:
    """What the method makes of the problem in every scheme of its own, or in all that it must take and does not refuse."""
    for scheme in method.schemes or SCHEMES:
        problem = linear_problem()
        yield scheme, problem, run_quantize(method, scheme, problem)
    for scheme in () if method.schemes else FURTHER:
        problem = linear_problem()
        try:
            tensor = run_quantize(method, scheme, problem)
        except QtoolError:
            continue
        yield scheme, problem, tensor


def codes_in_range(method: Method) -> None:
    """Codes, zero points and shapes are what the scheme says, and the scheme is the one asked for but for what is chosen."""
    for scheme, problem, tensor in results(method):
        asked = Scheme.model_validate(scheme).weights
        grid = tensor.scheme.grid
        least, most = int(tensor.codes.min()), int(tensor.codes.max())
        chosen = {field: getattr(tensor.scheme, field) for field in method.chooses}
        assert tensor.scheme == asked.model_copy(update=chosen), f"{scheme}: the result has another scheme, {tensor.scheme}"
        assert tensor.shape == problem.W.shape, f"{scheme}: shape {tensor.shape}, must be {tuple(problem.W.shape)}"
        assert grid.low <= least and most <= grid.high, f"{scheme}: codes from {least} to {most}"
        shape = to_groups(problem.W, tensor.scheme).shape[:2]
        assert tensor.scale.shape == shape, f"{scheme}: scale {tuple(tensor.scale.shape)}, must be {tuple(shape)}"
        assert bool((tensor.scale.float() != 0).all()), f"{scheme}: a scale is zero"
        assert (tensor.zero is None) == tensor.scheme.symmetric, f"{scheme}: zero points contradict `symmetric`"
        if tensor.zero is not None and tensor.scheme.zero_dtype == "int":
            assert int(tensor.zero.max()) <= grid.high, f"{scheme}: zero points out of range"
        assert tensor.zero is None or bool(torch.isfinite(tensor.zero).all()), f"{scheme}: a zero point is not finite"


def packing_is_lossless(method: Method) -> None:
    """Packed codes unpack to themselves."""
    for scheme, _, tensor in results(method):
        unpacked = unpack_codes(tensor.packed(), tensor.scheme.grid.n_levels, tensor.codes.shape[1]) + tensor.scheme.grid.low
        assert torch.equal(unpacked.int(), tensor.codes.int()), f"{scheme}: packing changes codes"


def grid_points_stay(method: Method) -> None:
    """Rounding the result once more, by its own params, changes no code."""
    for scheme, _, tensor in results(method):
        again = quantize(tensor.dequantize(), tensor.scheme, tensor.params())
        assert torch.equal(again.codes, tensor.codes), f"{scheme}: values are not on the grid of their params"


def quantizing_is_deterministic(method: Method) -> None:
    """Two runs give the same bits, and statistics are not used up."""
    for (scheme, _, first), (_, _, second) in zip(results(method), results(method), strict=True):
        is_same = torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
        assert is_same, f"{scheme}: two runs differ"


def loss_is_no_worse_than_rounding(method: Method) -> None:
    """With a Hessian, the proxy loss is at most that of rounding to nearest in the full range of the scheme asked for."""
    needs = method.needed(method.options.model_validate({"scheme": (method.schemes or SCHEMES)[0]}))
    if needs == ():
        return
    for scheme, problem, tensor in results(method):
        loss = problem.loss(tensor.dequantize(), needs)
        plain = problem.loss(quantize(problem.W, Scheme.model_validate(scheme).weights).dequantize(), needs)
        # Sums in float32 end in the sixth digit.
        assert loss <= plain * (1 + 1e-5), f"{scheme}: proxy loss {loss:.4g}, rounding has {plain:.4g}"


def quantizing_rows_apart_is_the_same(method: Method) -> None:
    """A rowwise method gives an output channel the same codes with other channels beside it and without."""
    for scheme, problem, whole in results(method) if method.rowwise else ():
        if whole.scheme.is_rowwise:
            half = run_quantize(method, scheme, replace(problem, W=problem.W[: OUT // 2].clone()))
            agree = float((whole.codes[: OUT // 2] == half.codes).float().mean())
            # Float32 sums over other shapes may move a few codes.
            assert agree > 0.98, f"{scheme}: {agree:.1%} of the codes agree"


# ---- prune ----


def run_prune(method: Method, choice: dict[str, object], problem: Problem) -> Tensor:
    options = method.options.model_validate(choice)
    result = method.run(problem.W.clone(), statistics(method, options, problem), options, lambda text: None)
    assert isinstance(result, Tensor), f"{method.key} returns {type(result).__name__}, must be Tensor"
    assert result.shape == problem.W.shape, f"shape {tuple(result.shape)}, must be {tuple(problem.W.shape)}"
    assert bool(torch.isfinite(result).all()), f"{method.key} returns values that are not finite"
    return result


def sparsity_is_exact(method: Method) -> None:
    """Of out · in weights exactly the asked share is zero."""
    for sparsity in (0.25, 0.5, 0.75):  # shares of 96 columns that are whole numbers
        zeros = int((run_prune(method, {"sparsity": sparsity}, linear_problem()) == 0).sum())
        assert zeros == sparsity * OUT * IN, f"sparsity {sparsity}: {zeros} zeros, must be {sparsity * OUT * IN:.0f}"


def pattern_is_exact(method: Method) -> None:
    """Of every M neighbouring inputs exactly N stay."""
    for keep, of_neighbours in ((2, 4), (1, 4), (4, 8)):
        pruned = run_prune(method, {"pattern": f"{keep}:{of_neighbours}"}, linear_problem())
        kept = (pruned.view(OUT, -1, of_neighbours) != 0).sum(-1)  # [out, in / M]
        least, most = int(kept.min()), int(kept.max())
        assert least == most == keep, f"pattern {keep}:{of_neighbours}: {least} to {most} stay"


def no_sparsity_changes_nothing(method: Method) -> None:
    """Sparsity 0 returns the weights to the bit."""
    problem = linear_problem()
    assert torch.equal(run_prune(method, {"sparsity": 0.0}, problem), problem.W), "sparsity 0 changes weights"


def pruning_is_deterministic(method: Method) -> None:
    """Two runs give the same bits."""
    first, second = (run_prune(method, {"sparsity": 0.5}, linear_problem()) for _ in range(2))
    assert torch.equal(first, second), "two runs differ"


def pruning_rows_apart_is_the_same(method: Method) -> None:
    """A rowwise method prunes an output channel the same way with other channels beside it and without."""
    if method.rowwise:
        problem = linear_problem()
        whole = run_prune(method, {"sparsity": 0.5}, problem)
        half = run_prune(method, {"sparsity": 0.5}, replace(problem, W=problem.W[: OUT // 2].clone()))
        agree = float(((whole[: OUT // 2] == 0) == (half == 0)).float().mean())
        assert agree > 0.98, f"{agree:.1%} of the mask agrees"


# ---- transform ----


def run_reshape(method: Method, factor: float, problem: Problem) -> Tensor:
    options = method.options.model_validate({"factor": factor})
    result = method.run(problem.W.clone(), statistics(method, options, problem), options, lambda text: None)
    assert isinstance(result, Tensor), f"{method.key} returns {type(result).__name__}, must be Tensor"
    assert result.shape == problem.W.shape, f"shape {tuple(result.shape)}, must be {tuple(problem.W.shape)}"
    assert bool(torch.isfinite(result).all()), f"{method.key} returns values that are not finite"
    return result


def reshaping_keeps_mean_and_deviation(method: Method) -> None:
    """Mean and standard deviation of all weights stay, within a thousandth of the deviation."""
    W = linear_problem().W + 0.3
    for factor in (0.25, 0.5, 0.9):
        changed = run_reshape(method, factor, replace(linear_problem(), W=W))
        mean, deviation = float(changed.mean() - W.mean()), float(changed.std() / W.std())
        assert abs(mean) < 1e-3 * float(W.std()), f"factor {factor}: the mean moves by {mean:.2g}"
        assert abs(deviation - 1) < 1e-3, f"factor {factor}: the standard deviation is {deviation:.4f} of what it was"


def reshaping_keeps_the_order(method: Method) -> None:
    """Of two weights the greater does not become the smaller, and equal weights stay equal."""
    problem = linear_problem()
    W = torch.round(problem.W * 20) / 20  # many equal ones
    changed = run_reshape(method, 0.5, replace(problem, W=W)).flatten()
    order = W.flatten().argsort(stable=True)
    steps, new_steps = W.flatten()[order].diff(), changed[order].diff()
    assert bool((new_steps >= 0).all()), "a greater weight becomes the smaller"
    assert bool((new_steps[steps == 0] == 0).all()), "equal weights become unequal"


def the_shape_falls_by_the_factor(method: Method) -> None:
    """The shape that the moments tell is `factor` times what it was, within 0.1."""
    problem = linear_problem()
    before = shape_of_moments(problem.W)
    for factor in (0.4, 0.6, 0.9):
        shape = shape_of_moments(run_reshape(method, factor, problem))
        assert abs(shape - before * factor) < 0.1, f"factor {factor}: shape {shape:.2f}, must be {before * factor:.2f}"


def shape_of_moments(W: Tensor) -> float:
    """The generalised Gaussian's shape, in hundredths, for which E w² / (E |w|)² about the mean is that of W."""
    D = W.double() - W.double().mean()
    ratio = float(D.square().mean() / D.abs().mean() ** 2)
    shapes = [n / 100 for n in range(20, 300)]
    return min(shapes, key=lambda s: abs(math.gamma(1 / s) * math.gamma(3 / s) / math.gamma(2 / s) ** 2 - ratio))


def reshaping_is_deterministic(method: Method) -> None:
    """Two runs give the same bits."""
    first, second = (run_reshape(method, 0.5, linear_problem()) for _ in range(2))
    assert torch.equal(first, second), "two runs differ"


# ---- factorize ----


def run_factorize(method: Method, rank: int, problem: Problem) -> LowRank:
    options = method.options.model_validate({"rank": rank})
    result = method.run(problem.W.clone(), statistics(method, options, problem), options, lambda text: None)
    assert isinstance(result, LowRank), f"{method.key} returns {type(result).__name__}, must be LowRank"
    assert result.rank == rank, f"rank {result.rank}, must be {rank}"
    return result


def error_falls_with_rank(method: Method) -> None:
    """More rank never costs more: by the proxy loss where the method sees inputs, else by the plain squared error."""
    problem = linear_problem()
    sees_inputs = method.needed(method.options.model_validate({"rank": 1})) != ()
    losses = []
    for rank in (1, 4, 8, 16, OUT):
        changed = run_factorize(method, rank, problem).multiply()
        losses.append(problem.loss(changed) if sees_inputs else float((problem.W - changed).square().sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0], f"losses by rising rank: {losses}"


def full_rank_is_exact(method: Method) -> None:
    """With all the rank that W has, the product is W."""
    problem = linear_problem()
    error = float((run_factorize(method, OUT, problem).multiply() - problem.W).norm() / problem.W.norm())
    # A float32 decomposition; scaling by inputs and back loses two digits more.
    assert error < 1e-4, f"relative error {error:.1e} at full rank"
