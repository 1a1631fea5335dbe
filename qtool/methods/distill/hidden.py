"""Train the model to give the original's predictions, hidden states and attention, block against block.

    L = KL(p ‖ q) + a L_hidden + attention L_attention
    L_hidden  mean over pairs and tokens of  ‖P h - h*‖² / ‖h*‖²  (mse)  or  1 - cos(P h, h*)  (cosine)
    L_attention  mean over pairs, heads and tokens of  KL(A* ‖ A) of attention over earlier tokens
    h, h* [tokens, hidden] outputs of a student's and a teacher's block    A, A* [heads, tokens, tokens]
    P [hidden of the teacher, hidden of the student] learns where the widths differ, else it is left away
a = KL / L_hidden of each step unless a number is stated (Muralidharan et al.). A student of fewer blocks is compared with
evenly spaced ones, the last with the last. Where the numbers of heads differ, the means over heads are compared.
Source: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron), section 3, for hidden states; Jiao et al. 2019, arXiv:1909.10351
(TinyBERT), equation 7, for attention. Differs: each token's error is relative to its own length, as residual streams have
few tokens of enormous length; attention is compared as distributions, not by squares.
For: models that lost blocks or width; for a model of the same shape distill/logits does as well with less.
Costs: training: 16 bytes a parameter, the original beside it, hidden states of all blocks twice; attention, where it counts,
runs without fused kernels.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.target import Target
from qtool.linalg.divergence import distillation_loss
from qtool.model.course import Course, Trainee
from qtool.options import TrainingOptions
from qtool.registry import Method


class HiddenOptions(TrainingOptions):
    """What beside the predictions is compared."""

    hidden: Annotated[float, Field(ge=0)] | Literal["balanced"] = Field(
        "balanced", description="weight of the hidden states' part; balanced: as large as the predictions' in every step"
    )
    attention: float = Field(0.0, ge=0, description="weight of the attentions' part; 0: they are not looked at")
    distance: Literal["mse", "cosine"] = Field("mse", description="of hidden states: relative squares, or directions alone")
    pairs: Literal["last", "all"] = Field("all", description="all: every block of the student; last: its last alone")


def matching(n_student: int, n_teacher: int) -> list[int]:
    """For each block of the student the teacher's block whose output it is to give; evenly spaced, the last with the last."""
    return [round((index + 1) * n_teacher / n_student) - 1 for index in range(n_student)]


def hidden_loss(h: Tensor, wanted: Tensor, distance: str) -> Tensor:
    """Of h and wanted [..., hidden], a scalar; zero where they are equal."""
    h, wanted = h.float(), wanted.float()
    if distance == "cosine":
        return (1 - torch.nn.functional.cosine_similarity(h, wanted, dim=-1)).mean()
    return ((h - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(h.dtype).tiny)).mean()


def attention_loss(A: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted ‖ A) of probabilities [batch, heads, length, length], mean over all but the last axis."""
    A, wanted = A.float(), wanted.float()
    if A.shape[1] != wanted.shape[1]:
        A, wanted = A.mean(1), wanted.mean(1)  # [batch, length, length]
    tiny = torch.finfo(A.dtype).tiny
    return (wanted * (wanted.clamp_min(tiny).log() - A.clamp_min(tiny).log())).sum(-1).mean()


def hidden(trainee: Trainee, options: HiddenOptions) -> Course:
    """Watch both models' blocks as they run, and compare what they give."""
    if trainee.teacher is None:
        raise QtoolError("distill/hidden looks at the original's hidden states; leave cache away, and labels below 1")
    models = (trainee.student, trainee.teacher)
    seen: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    looked: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    matched = matching(len(trainee.blocks[0]), len(trainee.blocks[1]))
    pairs = list(enumerate(matched))[-1:] if options.pairs == "last" else list(enumerate(matched))
    handles = []
    configs: dict[int, Any] = {
        id(config): config for model in models for config in (model.config, model.config.get_text_config())
    }
    for side, blocks in enumerate(trainee.blocks):
        if options.attention:  # a block that was loaded has a copy of the config; the model's own makes the masks
            configs |= {id(config): config for config in (attention_of(block).config for block in blocks)}
        for index in {pair[side] for pair in pairs}:
            handles.append(blocks[index].register_forward_hook(keep_first(seen[side], index)))
            if options.attention:
                handles.append(attention_of(blocks[index]).register_forward_hook(keep_second(looked[side], index)))
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values() if options.attention else ():
        config._attn_implementation = "eager"  # the kernel that gives probabilities
    widths = [int(model.config.get_text_config().hidden_size) for model in models]
    extra = None
    if widths[0] != widths[1]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trainee.seed)
            extra = nn.ModuleList([nn.Linear(widths[0], widths[1], bias=False) for _ in pairs]).to(trainee.student.device)

    def loss(logits: Tensor, target: Target, labels: Tensor) -> Tensor:
        kl = distillation_loss(logits, target, options.temperature)
        parts = []
        for place, (mine, wanted) in enumerate(pairs):
            h = seen[0][mine]
            parts.append(hidden_loss(h if extra is None else extra[place](h.float()), seen[1][wanted], options.distance))
        part = torch.stack(parts).mean()
        tiny = torch.finfo(part.dtype).tiny
        a = kl.detach() / part.detach().clamp_min(tiny) if options.hidden == "balanced" else options.hidden
        total = kl + a * part
        if options.attention:
            maps = [attention_loss(looked[0][mine], looked[1][wanted]) for mine, wanted in pairs]
            total = total + options.attention * torch.stack(maps).mean()
        return total

    def finish() -> dict[str, str]:
        for handle in handles:
            handle.remove()
        for key, config in configs.items():
            config._attn_implementation = before[key]
        return {}

    return Course(loss=loss, extra=extra, finish=finish)


def attention_of(block: nn.Module) -> nn.Module:
    """The block's attention; raises QtoolError where it has none by a known name."""
    for name, module in block.named_children():
        if name.endswith(("attn", "attention")):
            return module
    raise QtoolError(f"distill/hidden: attention: {type(block).__name__} has no attention by that name; set attention: 0")


def keep_first(found: dict[int, Tensor], index: int) -> Callable[..., None]:
    """A hook that keeps a block's output."""

    def hook(module: nn.Module, args: Any, out: Tensor | tuple[Tensor, ...]) -> None:
        found[index] = out[0] if isinstance(out, tuple) else out

    return hook


def keep_second(found: dict[int, Tensor], index: int) -> Callable[..., None]:
    """A hook that keeps an attention's probabilities."""

    def hook(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        found[index] = out[1]

    return hook


METHOD = Method(run=hidden, options=HiddenOptions, scope="course")
