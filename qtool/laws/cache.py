"""Laws of the methods that quantize the key/value cache."""

import torch
from torch import Tensor

from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.laws.model import sample_options, tiny_checkpoint
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import KiviLayer, quantize_by_kivi
from qtool.options import ModelOptions
from qtool.registry import Method

SAME = 1e-3  # relative; a key on the border of two codes, or of two numbers of float16, may fall to either side


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


def kept(method: Method, k: Tensor, v: Tensor, **stated: object) -> tuple[Tensor, Tensor]:
    """Keys and values as the method's cache gives them back once it holds them all; groups of 16."""
    found: tuple[Tensor, Tensor] = method.run(k, v, sample_options(method, group=16, **stated))
    return found


def the_first_and_the_latest_stay(method: Method) -> None:
    """Sinks and the latest tokens come back to the bit, and everything where so many tokens are kept; others are rounded."""
    k, v = samples()
    for x, found in zip((k, v), kept(method, k, v, sinks=3, residual=20), strict=True):
        changed = (found != x).any(-1).any(0).any(0)  # [tokens]
        assert not changed[:3].any() and not changed[-20:].any(), "a sink, or one of the latest tokens, is rounded"
        assert changed[3:35].all(), "an old token is not rounded"
    for x, found in zip((k, v), kept(method, k, v, residual=64), strict=True):
        assert torch.equal(found, x), "tokens are changed though all are to stay"


def more_bits_lose_less(method: Method) -> None:
    """The error of keys and of values falls with their bits."""
    k, v = samples()
    for bits, side, x in (("key_bits", 0, k), ("value_bits", 1, v)):
        lost = [float((kept(method, k, v, residual=0, **{bits: n})[side] - x).norm()) for n in (2, 3, 4, 8)]
        assert all(more > less for more, less in zip(lost, lost[1:], strict=False)), f"{bits}: errors {lost}"


def the_cache_gives_back_what_the_method_says(method: Method) -> None:
    """Token by token into a model's cache: what comes out is what the method says, and codes take less than numbers."""
    k, v = samples()
    options = sample_options(method, group=16, residual=5, sinks=2)
    assert isinstance(options, KiviScheme), "options of a method of scope packed_cache are a KiviScheme"
    layer = KiviLayer(options, None)
    for pair in zip(k.split(1, 2), v.split(1, 2), strict=True):
        found = layer.update(*pair)
    for one, other in zip(found, method.run(k, v, options), strict=True):
        assert torch.equal(one, other), "the cache gives back something else"
    assert layer.nbytes < (k.nbytes + v.nbytes) / 2, f"the cache takes {layer.nbytes} bytes"


def decoding_is_the_window(method: Method) -> None:
    """Tokens one by one through the cache give the logits of the whole window without one."""
    tokens = torch.randint(2, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    options = sample_options(method, group=16, residual=6, sinks=2)
    assert isinstance(options, KiviScheme), "options of a method of scope packed_cache are a KiviScheme"
    with tiny_checkpoint() as folder:
        handle = ModelHandle(ModelOptions(path=str(folder)))
        with handle.materialized() as model, torch.no_grad():
            for name in handle.attention_names():
                quantize_by_kivi(model.get_submodule(name), options)
            whole, past, found = model(tokens, use_cache=False).logits, None, []
            for piece in (tokens[:, :3], *tokens[:, 3:].split(1, 1)):
                out = model(piece, past_key_values=past, use_cache=True)
                past = out.past_key_values
                found.append(out.logits)
    change = float((torch.cat(found, 1) - whole).norm() / whole.norm())
    assert change <= SAME, f"decoding differs from the window by {change:.1e}"
