"""Importance: how much each unit of a model does on the calibration text: heads, neurons, hidden channels, blocks, experts.

    unit a       sqrt( sum over windows of (mean over its tokens of |a|)² )
                 neuron: its input of the down projection; head: the norm of its part of the output projection's input;
                 hidden channel: the output of a norm, all norms' scores added
    block l      influence 1 - mean over tokens of cos(h_l, h_l+1);  or the loss of the model without it, nats a token
    expert e     mean over the tokens t routed to it of  p_e(t) ‖f_e(t)‖,  p the router's weight, f the expert's output (REAP)
Tokens that reach an expert have lost their windows: they count as one a forward.
Source: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron), section 2.2; Men et al. 2024, arXiv:2403.03853 (ShortGPT);
Lasby et al. 2025, arXiv:2510.13999 (REAP).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.calibration.mixture import Mixture, RoutedScores, observe_experts
from qtool.layers.experts import Experts
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import BATCH, ModelHandle
from qtool.model.linear import input_place, is_linear
from qtool.model.shape import Shape, Sides, find_sides, place_of, shape_of_model


class UnitScores:
    """Accumulates sqrt( sum over windows of (mean over tokens of |a|)² ) of units of `width` channels."""

    def __init__(self, n_units: int, width: int = 1) -> None:
        self._width = width
        self._sum = torch.zeros(n_units, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """x [batch, length, units · width], or [tokens, units · width] of an expert."""
        if x.numel() == 0:
            return
        x = x if x.ndim == 3 else x.unsqueeze(0)
        size = x.float().unflatten(-1, (-1, self._width)).norm(dim=-1)  # [batch, length, units]
        self._sum += size.mean(1).double().square().sum(0).cpu()

    def scores(self) -> Tensor:
        """[units], float64."""
        return self._sum.sqrt()


class Importance:
    """Looks at one model on tokens [samples, length]; `advance` is told of every block looked at."""

    def __init__(
        self,
        model: ModelHandle,
        tokens: Tensor,
        advance: Callable[[], None] = lambda: None,
        divergence: Callable[[Cut], float] | None = None,
    ) -> None:
        """divergence: KL in nats a token of the model so cut from the model as it is, for methods that try several."""
        self.model, self.tokens = model, tokens
        self._advance = advance
        self._divergence = divergence

    def divergence(self, cut: Cut) -> float:
        """KL in nats a token, on the first windows, of the model so cut from the model as it is."""
        assert self._divergence is not None, "the pipeline hands what can cut a model"
        return self._divergence(cut)

    # ---- units within blocks ----

    @torch.no_grad()
    def of_units(self, axes: Sequence[str]) -> dict[str, Tensor]:
        """Scores [units], float64, by "axis:place", of `neurons`, `heads` and `hidden`: one pass for all."""
        sides, scores = find_sides(self.model, axes), dict[str, UnitScores]()
        hidden = self.model.embed(self.tokens)
        for block in self.model.blocks():
            with self._observed(block.module, f"{block.name}.", sides, scores):
                hidden = block.forward(hidden)
            self._advance()
        if "hidden" in axes:
            with self.model.outer(), self._observed(self.model.model, "", sides, scores):
                for batch in hidden.split(BATCH):
                    self.model.logits(batch)
        found: dict[str, Tensor] = {}
        for name, score in scores.items():
            place = name.partition("@")[0]  # each norm has scores by itself
            found[place] = found.get(place, 0) + score.scores()
        return found

    @contextlib.contextmanager
    def _observed(self, root: nn.Module, prefix: str, sides: Sides, scores: dict[str, UnitScores]) -> Iterator[None]:
        """Inside, what the forward of `root` shows of units goes into `scores`."""
        shape, hooks = shape_of_model(self.model), []
        for local, module in root.named_modules():
            name = f"{prefix}{local}.weight"
            is_elsewhere = not prefix and name.startswith(f"{self.model.blocks_name}.")  # a block's own, as root holds all
            of_module = () if is_elsewhere else sides.get(name, ())
            if "Norm" in type(module).__name__ and [[s.axis for s in side] for side in of_module] == [["hidden"]]:
                seen = scores[f"hidden:@{name}"] = UnitScores(shape.hidden)
                hooks.append(module.register_forward_hook(lambda _, args, out, seen=seen: seen.update(out)))
            elif is_linear(module) and of_module:
                side = of_module[input_place(module)]
                if len(side) == 1 and side[0].axis in ("neurons", "heads"):
                    axis = side[0].axis
                    place = f"{axis}:{place_of(name, axis, self.model)}"
                    seen = scores[place] = UnitScores(getattr(shape, axis), side[0].width)
                    hooks.append(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- blocks ----

    @torch.no_grad()
    def influence(self, blocks: Sequence[int]) -> Tensor:
        """1 - mean over tokens of the cosine of its input and its output [blocks], of each of these blocks of the model.

        Those not among them are left out.
        """
        hidden, found = self.model.embed(self.tokens), []
        for index in blocks:
            after = self._through(index, hidden)
            cosine = F.cosine_similarity(hidden.double(), after.double(), dim=-1)  # [samples, length]
            found.append(1 - float(cosine.mean()))
            hidden = after
            self._advance()
        return torch.tensor(found, dtype=torch.float64)

    @torch.no_grad()
    def losses_without(self, blocks: Sequence[int]) -> Tensor:
        """The model's loss, nats a token, without each of these blocks [blocks]; those not among them are left out too."""
        hidden, found = self.model.embed(self.tokens), []
        for place, index in enumerate(blocks):
            without = hidden
            for later in blocks[place + 1 :]:
                without = self._through(later, without)
            found.append(self._loss(without))
            hidden = self._through(index, hidden)
            self._advance()
        return torch.tensor(found, dtype=torch.float64)

    def _through(self, index: int, hidden: Tensor) -> Tensor:
        after = self.model.block(index).forward(hidden)
        self.model.release(index)
        return after

    def _loss(self, hidden: Tensor) -> float:
        total = 0.0
        with self.model.outer():
            for sample, ids in zip(hidden.split(1), self.tokens, strict=True):  # one window's logits at a time
                logits = self.model.logits(sample)[0, :-1].float()  # [length - 1, vocab]
                total += float(F.cross_entropy(logits, ids[1:].to(logits.device)))
        return total / len(self.tokens)

    # ---- experts ----

    @torch.no_grad()
    def of_experts(self) -> dict[str, RoutedScores]:
        """Router-weighted output norms of the experts, by "experts:block"."""
        found: dict[str, RoutedScores] = {}
        hidden = self.model.embed(self.tokens)
        for block in self.model.blocks():
            hooks = []
            for module in block.module.modules():
                if isinstance(module, Experts):
                    scores = found[f"experts:{block.name}"] = RoutedScores(len(module.down))
                    hooks += observe_experts(module, scores)
            hidden = block.forward(hidden)
            for hook in hooks:
                hook.remove()
            self._advance()
        return found

    @torch.no_grad()
    def mixtures(self, cut: Cut) -> Iterator[tuple[str, Mixture]]:
        """Every mixture in turn, by "experts:block", fed with what the blocks before it give once they are cut.

        Before the next one is asked for, `cut` must have been told what stays of this one.
        """
        cutter, hidden = Cutter(self.model, cut), self.model.embed(self.tokens)
        for index, block in enumerate(self.model.blocks()):
            experts = next((module for module in block.module.modules() if isinstance(module, Experts)), None)
            if experts is None:
                hidden = block.forward(hidden)
            else:
                mixture = Mixture(experts, hidden.shape[-1], block.device)
                with mixture.observed(block.module):
                    block.forward(hidden)
                yield f"experts:{block.name}", mixture
                hidden = cutter.forward(block, index, hidden)
            self._advance()


def most(scores: Tensor, count: int) -> Tensor:
    """The `count` units of greatest score, ascending; of equal scores the earlier one stays."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def kept_units(model: ModelHandle, scores: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Of all that `Importance.of_units` has scored, the units that stay in a model of this shape, by "axis:place".

    Key/value heads go with their whole groups, those of least norm of their heads' scores; then each group that stays keeps as
    many heads.
    """
    old, kept = shape_of_model(model), dict[str, Tensor]()
    for name, values in scores.items():
        axis, _, place = name.partition(":")
        if axis != "heads":
            kept[name] = most(values, getattr(shape, axis))
            continue
        of_group = values.view(old.kv_heads, -1)  # [kv_heads, heads of a group]
        groups = most(of_group.norm(dim=1), shape.kv_heads)
        within = torch.stack([most(of_group[group], shape.heads // shape.kv_heads) for group in groups])
        kept[name] = (groups[:, None] * of_group.shape[1] + within).flatten()
        if old.kv_heads != shape.kv_heads:
            kept[f"kv_heads:{place}"] = groups
    return kept


def head_partners(scores: Tensor, kept: Tensor, n_groups: int) -> Tensor:
    """For every head [heads that stay] the dropped one that it takes on, -1 for none: the head residual of Minitron.

    scores [heads]. Of K heads that stay by falling score, the last takes on the best of those that go, the one before it the
    next, and so on; within groups where heads share keys and values.
    """
    partners = torch.full_like(kept, -1)
    staying = set(kept.tolist())
    for group in torch.arange(len(scores)).view(n_groups, -1):
        ranked = group[scores[group].argsort(descending=True, stable=True)].tolist()
        stays, goes = [head for head in ranked if head in staying], [head for head in ranked if head not in staying]
        for head, partner in zip(reversed(stays), goes, strict=False):
            partners[(kept == head).nonzero()] = partner
    return partners
