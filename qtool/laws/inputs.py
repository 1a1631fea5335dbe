"""Laws of the methods that find static scales for the inputs of linears."""

import torch
from torch import Tensor

from qtool.calibration.input_values import InputValues
from qtool.formats.inputs import InputScales, fit_inputs, grouped_inputs
from qtool.formats.scheme import ActivationScheme, input_fields
from qtool.laws.model import sample_options
from qtool.registry import Method

WORDS = ("int8static", "int4asymstatic", "e4m3static", "nvfp4static")


def samples() -> Tensor:
    """Inputs [tokens 96, in 64] float32, uneven from channel to channel and around a mean of their own."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(96, 64, generator=random) * torch.rand(64, generator=random).exp() + 0.5


def scales_of(method: Method, scheme: ActivationScheme, *batches: Tensor) -> InputScales:
    """What the method finds for batches [tokens, in]."""
    seen = InputValues(scheme.group)
    for batch in batches:
        seen.update(batch)
    found: InputScales = method.run(seen, scheme, torch.float32, sample_options(method), lambda text: None)
    return found


def no_input_in_the_range_is_further_than_half_a_step(method: Method) -> None:
    """Scales are positive and finite, and what they reach is rounded to the nearest level."""
    x = samples()
    for word in WORDS:
        scheme = ActivationScheme.model_validate(input_fields(f"a{word}"))
        found, grid = scales_of(method, scheme, x), scheme.grid
        assert found.scale.shape == (1,) and bool(torch.isfinite(found.scale) & (found.scale > 0)), f"{word}: {found.scale}"
        assert (found.zero is None) == scheme.symmetric, f"{word}: zero points contradict `symmetric`"
        wide = grouped_inputs(x, scheme)  # [tokens, groups, group]
        params = fit_inputs(wide, scheme, found)
        zero = 0.0 if params.zero is None else params.zero
        low, high = ((end - zero) * params.scale for end in grid.ends)
        inside = (wide >= low) & (wide <= high)
        levels = (grid.levels(torch.arange(grid.low, grid.high + 1).float()) - zero).sort().values  # [levels]
        widest = float(levels.diff().max()) * params.scale
        error = (grid.snap(wide, params) - wide).abs()
        assert bool((error <= widest / 2 * (1 + 1e-4))[inside].all()), f"{word}: an input is further off than half a step"
        assert float(inside.float().mean()) > 0.5, f"{word}: the scale reaches only few of the inputs"


def scales_follow_the_inputs(method: Method) -> None:
    """Four times the inputs give four times the scale, to the bit, and the same zero point; the same inputs the same."""
    for word in WORDS:
        scheme = ActivationScheme.model_validate(input_fields(f"a{word}"))
        once, again, wide = (scales_of(method, scheme, x) for x in (samples(), samples(), 4 * samples()))
        assert torch.equal(once.scale, again.scale), f"{word}: another scale the second time"
        assert torch.equal(wide.scale, 4 * once.scale), f"{word}: scales do not follow"
        assert once.zero is None or (wide.zero is not None and torch.equal(once.zero, wide.zero)), f"{word}: zero points moved"


def every_order_of_tokens_gives_the_same_scales(method: Method) -> None:
    """Tokens in another order, and in other batches, are the same calibration text."""
    x = samples()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for word in WORDS:
        scheme = ActivationScheme.model_validate(input_fields(f"a{word}"))
        whole, pieces = scales_of(method, scheme, x), scales_of(method, scheme, *x[order].split(7))
        assert torch.equal(whole.scale, pieces.scale), f"{word}: the order of tokens decides the scale"
