"""Laws of the methods that quantize the key/value cache."""

import torch
from torch import Tensor

from qtool.formats.kv_cache import CacheScales
from qtool.laws.model import sample_options
from qtool.registry import Method


def scales_of(method: Method, k: Tensor, v: Tensor) -> CacheScales:
    """What the method finds for largest magnitudes k and v [kv heads, head_dim]."""
    found: CacheScales = method.run(k, v, torch.float32, sample_options(method), lambda text: None)
    return found


def samples() -> tuple[Tensor, Tensor]:
    """Keys and values [2, kv heads 4, tokens 64, head_dim 16] float32; one channel of the keys stands far out."""
    k, v = torch.randn(2, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    k[:, 0, :, 3] *= 40
    return k, v


def what_was_seen_is_covered(method: Method) -> None:
    """Nothing that was seen is clipped: no entry is further from its rounded one than the grid's own spacing allows."""
    k, v = samples()
    found = scales_of(method, k.abs().amax((0, 2)), v.abs().amax((0, 2)))
    for x, scale, rounded in ((k, found.k_scale, found.round_keys(k)), (v, found.v_scale, found.round_values(v))):
        assert scale.shape == (1,) and bool(torch.isfinite(scale) & (scale > 0)), f"a scale of {scale}"
        if found.scheme.format == "int":
            room = scale / 2
        else:
            room = (x.abs() / 16).clamp_min(float(scale) * 2**-10)  # half a step of three bits of mantissa
        assert bool(((rounded - x).abs() <= room * (1 + 1e-4)).all()), "an entry that was seen is further off than half a step"


def scales_follow_the_range(method: Method) -> None:
    """Four times the range gives four times the scale, to the bit; the same range the same scale."""
    k, v = (x.abs().amax((0, 2)) for x in samples())
    once, again, wide = scales_of(method, k, v), scales_of(method, k, v), scales_of(method, 4 * k, 4 * v)
    assert torch.equal(once.k_scale, again.k_scale) and torch.equal(once.v_scale, again.v_scale), "other scales the second time"
    assert torch.equal(wide.k_scale, 4 * once.k_scale) and torch.equal(wide.v_scale, 4 * once.v_scale), "scales do not follow"
