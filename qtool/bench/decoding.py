"""How a model writes one token after another while it is timed.

    graph    on a GPU: a step is recorded once in a CUDA graph and replayed for each token: Python's launches are not timed
    calls    on a CPU, and where a step cannot be recorded: Python calls the model for each token, with its own, growing cache
A recorded step is the same kernels at the same addresses, whichever token it is. So its cache has room for the whole text from
the beginning, attentions read all of that room, and how much of it is full is a number on the GPU, which the step counts up. It
keeps what a sliding window has left behind, too: the mask hides it, and what rolls would be other kernels for other tokens.
A step cannot be recorded where the model's cache is of another kind, or where Python waits in it for a number from the GPU, as
it does to see which tokens go to an expert. Results say which form was timed, and why.
Why recorded and not compiled: torch.compile makes other kernels of all that stands between the products, and takes minutes.
"""

import inspect
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from qtool.model.rounded_attention import keeps_codes

GRAPH, CALLS = "graph", "calls"
WARM = 2  # steps: what is compiled, packed or allocated at first is not measured


class Decoding(Protocol):
    """Greedy decoding of rows side by side; `token` [batch, 1] is the last that was chosen.

    form: GRAPH or CALLS; why: what a step cannot be recorded for, None where it was, and on a CPU, where nothing is.
    """

    token: Tensor
    form: str
    why: str | None

    def clear(self) -> None:
        """Forget the text."""

    def first(self, prompt: Tensor) -> None:
        """Choose the first token after a prompt [batch, length]."""

    def next(self) -> None:
        """Choose one more."""


class GrowingCache:
    """The cache that the model makes itself."""

    form: str = CALLS
    token: Tensor

    def __init__(self, model: PreTrainedModel, why: str | None = None) -> None:
        self.why = why
        self._model = model
        self._cache: Cache | None = None

    def clear(self) -> None:
        self._cache = None

    def first(self, prompt: Tensor) -> None:
        self.token, self._cache = next_token(self._model, prompt, self._cache)

    def next(self) -> None:
        self.first(self.token)


class FixedCache:
    """A cache with room for a whole text; `record` makes a replay of each later step."""

    form: str = CALLS
    why: str | None = None

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        """cache: as `fixed_cache` makes it."""
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        self._model = model
        self._cache = cache
        self._graph: torch.cuda.CUDAGraph | None = None

    def clear(self) -> None:
        self._cache.reset()

    def first(self, prompt: Tensor) -> None:
        self.token.copy_(next_token(self._model, prompt, self._cache)[0])

    def next(self) -> None:
        if self._graph is None:
            self.first(self.token)
        else:
            self._graph.replay()

    def record(self) -> None:
        """Record a step, which must have run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.next()
        self._graph, self.form = graph, GRAPH


@torch.no_grad()
def make_decoding(model: PreTrainedModel, prompt: Tensor, new: int) -> Decoding:
    """The form in which `new` tokens after prompts [batch, length] are timed, warm."""
    if model.device.type != "cuda":
        return _warm(GrowingCache(model), prompt)
    cache = fixed_cache(model, prompt.shape[1] + new)
    if isinstance(cache, str):
        return _warm(GrowingCache(model, cache), prompt)
    fixed = FixedCache(model, cache, len(prompt))
    side = torch.cuda.Stream(model.device)
    side.wait_stream(torch.cuda.current_stream(model.device))
    with torch.cuda.stream(side):  # as torch asks before a recording
        _warm(fixed, prompt)
        fixed.clear()
        fixed.first(prompt)
        why = reason_to_wait(fixed.next)
    torch.cuda.current_stream(model.device).wait_stream(side)
    if why is not None:
        return _warm(GrowingCache(model, why), prompt)
    fixed.record()
    return fixed


def fixed_cache(model: PreTrainedModel, length: int) -> Cache | str:
    """Room for `length` tokens in every layer, with one and the same step for each of them; else why there is none."""
    if keeps_codes(model):
        return "its cache keeps packed codes, and grows"
    layers = StaticCache(config=model.config, max_cache_len=length).layers
    other = {type(layer).__name__ for layer in layers} - {StaticLayer.__name__, StaticSlidingWindowLayer.__name__}
    if other:
        return f"its cache has layers of {', '.join(sorted(other))}, not of keys and values alone"
    return Cache(layers=[StaticLayer(length) for _ in layers])


def reason_to_wait(step: Callable[[], None]) -> str | None:
    """Where in a step Python waits for the GPU, or None; the step may not have run to its end."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its mode is a prototype and may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"Python waits for the GPU in {last.name}, {Path(last.filename).name}:{last.lineno}"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


@torch.no_grad()
def next_token(model: PreTrainedModel, ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """The likeliest token [batch, 1] after ids [batch, length] and what the cache holds, and the cache with them."""
    # Logits of the last position alone, as generate() asks for them, where the architecture knows how to.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(ids, past_key_values=cache, use_cache=True, **last)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def _warm(decoding: Decoding, prompt: Tensor) -> Decoding:
    decoding.clear()
    decoding.first(prompt)
    for _ in range(WARM):
        decoding.next()
    return decoding
