"""AdamW whose two moments are stored in eight bits each, in blocks that have a scale of their own.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g²        w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps)
    m = s (c / 127)² sign(c),  c in -127 .. 127        v = s (c / 255)⁴,  c in 0 .. 255        s = largest of a block
m^, v^ are divided by 1 - b1^t, 1 - b2^t. Both are decoded, moved and encoded again in each step, one parameter at a time.
Source: Dettmers et al. 2022, arXiv:2110.02861 (8-bit optimizers via block-wise quantization), section 2. Differs: powers of
the code in place of a table, which reach as far down (1 / 16129 and 2.4e-10 of the largest); a second moment that is not
zero is never stored as zero, so that no step is divided by eps alone.
Why not a library's: bitsandbytes' runs on GPUs alone, torchao's compiles a kernel with a C++ compiler at its first step.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 256  # values that share a scale, as in the paper's section 2.1 (2048 there, 256 in its later code)
SMALL = 4096  # parameters of fewer values, norms and biases, keep moments in float32, as the paper's code does


class AdamW8bit(torch.optim.Optimizer):
    """Takes what torch.optim.AdamW takes; states `exp_avg` and `exp_avg_sq` are codes, and code 0 is 0."""

    def __init__(self, params: object, weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": weight_decay, "betas": betas, "eps": 1e-8})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                w, g, state = local(p), local(p.grad).float(), self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = read(state, "exp_avg", 2, g).lerp_(g, 1 - b1)
                v = read(state, "exp_avg_sq", 4, g).mul_(b2).addcmul_(g, g, value=1 - b2)
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - b1**t))
                write(state, "exp_avg", m, 2, 127)
                write(state, "exp_avg_sq", v, 4, 255)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read(state: dict[str, Tensor], name: str, power: int, like: Tensor) -> Tensor:
    """A moment in float32, of the shape of `like`."""
    if name not in state:
        return torch.zeros_like(like)
    if f"{name}_scale" not in state:
        return state[name].clone()
    codes = blocks(state[name].float())  # [blocks, block]; loading a state may have widened them
    values = state[f"{name}_scale"] * codes.sign() * codes.abs().pow(power)
    return values.flatten()[: like.numel()].view_as(like)


def write(state: dict[str, Tensor], name: str, value: Tensor, power: int, n_levels: int) -> None:
    """Keep a moment: as codes in its shape and scales [blocks, 1], or as it is where it is small."""
    if value.numel() < SMALL:
        state[name] = value
        return
    parts = blocks(value)  # [blocks, block]
    largest = parts.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # [blocks, 1]
    codes = (parts.abs() / largest).pow_(1 / power).mul_(n_levels).round_()
    if power == 4:
        codes = torch.where(parts > 0, codes.clamp_min(1), codes)
    kept = (codes * parts.sign()).flatten()[: value.numel()].view_as(value)
    state[name] = kept.to(torch.uint8 if n_levels == 255 else torch.int8)
    state[f"{name}_scale"] = largest / n_levels**power


def blocks(value: Tensor) -> Tensor:
    """The values in rows [blocks, block], the last filled with zeros."""
    flat = value.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
