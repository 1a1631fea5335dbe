"""The ONNX graph of a llama-like decoder: tokens, mask and the cache of earlier tokens in, logits and the longer cache out.

    input_ids, position_ids [batch, sequence]    attention_mask [batch, total], 1 for a token    total = past + sequence
    past_key_values.N.key, .value [batch, kv heads, past, head]    past is 0 at first
    logits [batch, sequence, vocab]    present.N.key, .value [batch, kv heads, total, head]
    block    h += o(attention(q(n), k(n), v(n))), n = norm(h);  h += down(silu(gate(n)) up(n)), n = norm(h)
    norm     x w / sqrt(mean(x^2) + eps)
    rotary   (a cos - b sin, b cos + a sin) of a head's halves a and b, by the angle position inv_freq
Everything is float32, which CPUs compute in; tensors stand in the file in the model's own dtype and are widened by a Cast,
which onnxruntime does once when it loads, as it does the Transpose of dense weights [out, in].
Rows of a batch may be padded on the left, with positions counted from the first token, as transformers' generate does. What is
padding attends to nothing; its logits mean nothing.
Heads that share keys are the rows of one product with them. Windows of attention are kept; the cache holds more than they need.
Source: transformers 5.23, models/llama, mistral, qwen2 and qwen3; names of inputs and outputs: optimum-onnx 0.1.
Why position_ids are asked for, though attention_mask tells them: optimum takes a graph without them for one of an old kind.
Why operators of opset 21 and not newer ones (RMSNormalization, RotaryEmbedding, Attention): more runtimes have
them, and onnxruntime fuses norms itself.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import Form
from qtool.model.handle import ModelHandle
from qtool.model.onnx_file import MICROSOFT, Attribute, Graph, Node, Port

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles do not change with the length
HIDDEN = float(torch.finfo(torch.float32).min)  # added to the score of what is not to be seen
PAST, TOTAL = "past_sequence_length", "past_sequence_length + sequence_length"
FLOAT, BOOL = 1, 9  # ONNX's numbers of these types
EMBEDDING = "model.embed_tokens.weight"


def check_family(model: ModelHandle) -> None:
    """Raise QtoolError for a model that the graph does not compute."""
    config, kind = model.config, str(model.config.model_type)
    if kind not in FAMILIES:
        raise QtoolError(f"{kind} models cannot be written, {', '.join(FAMILIES)} can; use export/safetensors")
    if config.hidden_act not in ("silu", "swish"):
        raise QtoolError(f"{kind} with {config.hidden_act} cannot be written, with silu it can; use export/safetensors")
    rope = dict(getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise QtoolError(f"rotary positions of type {rope} cannot be written, {', '.join(ROPES)} can; use export/safetensors")
    n_angles, head_dim = len(rotation_of(model)[0]), head_dim_of(model)
    if 2 * n_angles != head_dim:
        raise QtoolError(f"heads of {head_dim} of which {2 * n_angles} are turned cannot be written; use export/safetensors")
    strange = model.stored_names().symmetric_difference(build_graph(model, {}).tensors)
    if strange:
        raise QtoolError(f"{min(strange)}: models of {kind} have no such tensor, or lack it here; use export/safetensors")


def build_graph(model: ModelHandle, forms: dict[str, Form], accuracy_level: int = 1) -> Graph:
    """The graph of the model; forms: how the quantized linears' weights are held, by their full names.

    accuracy_level is MatMulNBits': 1, inputs and sums in float32; 4, inputs rounded to eight bits.
    """
    return Decoder(model, forms, accuracy_level).build()


@dataclass(frozen=True)
class Shared:
    """Values that all blocks use: cos and sin of the angles, what is added to scores by the window, shapes of scores."""

    cos: str
    sin: str
    bias: dict[int | None, str]
    by_head: str
    by_kv_head: str


class Decoder:
    """Builds the nodes of one model; methods that add nodes return the name of the last one's output."""

    def __init__(self, model: ModelHandle, forms: dict[str, Form], accuracy_level: int) -> None:
        config = model.config
        self.accuracy_level = accuracy_level
        self.model, self.forms, self.stored = model, forms, model.stored_names()
        self.eps = float(config.rms_norm_eps)
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.head_dim = head_dim_of(model)
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.tensors: dict[str, None] = {}  # stored ones that the nodes use, in order

    def build(self) -> Graph:
        shared = self.shared()
        rows = self.add("Gather", (self.stored_tensor(EMBEDDING), "input_ids"), "embedding_rows")
        hidden = self.widen(rows, "embedding")  # [batch, sequence, hidden]
        for index in range(self.model.n_blocks):
            hidden = self.block(index, hidden, shared)
        hidden = self.norm("model.norm", hidden)
        if self.model.is_tied:
            table = self.widen(self.stored_tensor(EMBEDDING), "embedding_float32")
            self.multiply_dense(hidden, table, "logits")
        else:
            self.linear("lm_head", hidden, "logits")
        return Graph(self.nodes, self.constants, self.inputs(), self.outputs(), list(self.tensors))

    def inputs(self) -> list[Port]:
        tokens, positions = (Port(name, "INT64", ("batch_size", "sequence_length")) for name in ("input_ids", "position_ids"))
        mask = Port("attention_mask", "INT64", ("batch_size", TOTAL))
        return [tokens, mask, positions, *self.cache("past_key_values", PAST)]

    def outputs(self) -> list[Port]:
        shape = ("batch_size", "sequence_length", int(self.model.config.vocab_size))
        return [Port("logits", "FLOAT", shape), *self.cache("present", TOTAL)]

    def cache(self, name: str, length: str) -> list[Port]:
        shape = ("batch_size", self.n_kv_heads, length, self.head_dim)
        indices = range(self.model.n_blocks)
        return [Port(f"{name}.{index}.{part}", "FLOAT", shape) for index in indices for part in ("key", "value")]

    # ---- the model ----

    def shared(self) -> Shared:
        """Positions, angles and what each token may see, once for all blocks."""
        past = self.add("Shape", ("past_key_values.0.key",), "past", {"start": 2, "end": 3})  # [1]
        total = self.add("Shape", ("attention_mask",), "total", {"start": 1, "end": 2})  # [1]
        cos, sin = self.angles()
        axis, step = self.whole(0), self.whole(1)
        whole_range = (self.number(0), self.add("Squeeze", (total,), "total_number"), self.number(1))
        keys = self.add("Range", whole_range, "keys")  # [total]
        queries = self.add("Slice", (keys, past, total, axis, step), "queries")  # [sequence]
        queries = self.add("Unsqueeze", (queries, self.whole(1)), "queries_column")  # [sequence, 1]
        tokens = self.add("Cast", ("attention_mask",), "is_token", {"to": BOOL})
        tokens = self.add("Unsqueeze", (tokens, self.whole(1, 2, 3)), "is_token_by_head")  # [batch, 1, 1, 1, total]
        causal = self.add("LessOrEqual", (keys, queries), "is_before")  # [sequence, total]
        bias = {}
        for window in dict.fromkeys(windows_of(self.model)):
            seen, name = causal, "" if window is None else f"_{window}"
            if window is not None:
                first = self.add("Sub", (queries, self.whole(window)), f"before_window{name}")
                near = self.add("Greater", (keys, first), f"is_near{name}")
                seen = self.add("And", (causal, near), f"is_in_window{name}")
            seen = self.add("And", (tokens, seen), f"is_seen{name}")  # [batch, 1, 1, sequence, total]
            bias[window] = self.add("Where", (seen, self.real(0.0), self.real(HIDDEN)), f"bias{name}")
        group = self.n_heads // self.n_kv_heads
        by_head = self.add("Concat", (self.whole(0, self.n_kv_heads, group, -1), total), "by_head", {"axis": 0})
        by_kv_head = self.add("Concat", (self.whole(0, 0, -1), total), "by_kv_head", {"axis": 0})
        return Shared(cos, sin, bias, by_head, by_kv_head)

    def angles(self) -> tuple[str, str]:
        """cos and sin [batch, 1, sequence, head / 2] of the tokens' angles."""
        positions = self.add("Unsqueeze", ("position_ids", self.whole(1, 3)), "positions_by_head")  # [batch, 1, sequence, 1]
        positions = self.add("Cast", (positions,), "positions_float32", {"to": FLOAT})
        self.constants["inv_freq"], scaling = rotation_of(self.model)
        angles = self.add("Mul", (positions, "inv_freq"), "angles")
        found = [self.add(op, (angles,), op.lower()) for op in ("Cos", "Sin")]
        if scaling != 1:
            found = [self.add("Mul", (name, self.real(scaling)), f"{name}_scaled") for name in found]
        return found[0], found[1]

    def block(self, index: int, hidden: str, shared: Shared) -> str:
        name = f"model.layers.{index}"
        n = self.norm(f"{name}.input_layernorm", hidden)
        attended = self.attention(f"{name}.self_attn", index, n, shared)
        hidden = self.add("Add", (hidden, attended), f"{name}/after_attention")
        n = self.norm(f"{name}.post_attention_layernorm", hidden)
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", n) for part in ("gate", "up"))
        sigmoid = self.add("Sigmoid", (gate,), f"{name}/sigmoid")
        silu = self.add("Mul", (gate, sigmoid), f"{name}/silu")
        product = self.add("Mul", (silu, up), f"{name}/gated")
        return self.add("Add", (hidden, self.linear(f"{name}.mlp.down_proj", product)), f"{name}/output")

    def attention(self, name: str, index: int, x: str, shared: Shared) -> str:
        """What tokens take from those they see, x and the result [batch, sequence, hidden]."""
        q = self.rotated(name, "q", x, self.n_heads, shared)  # [batch, heads, sequence, head]
        k = self.rotated(name, "k", x, self.n_kv_heads, shared)  # [batch, kv heads, sequence, head]
        v = self.heads(self.linear(f"{name}.v_proj", x), f"{name}/v", self.n_kv_heads)
        past = f"past_key_values.{index}"
        k = self.add("Concat", (f"{past}.key", k), f"present.{index}.key", {"axis": 2})  # [batch, kv heads, total, head]
        v = self.add("Concat", (f"{past}.value", v), f"present.{index}.value", {"axis": 2})
        q = self.add("Mul", (q, self.real(self.head_dim**-0.5)), f"{name}/q_scaled")
        q = self.add("Reshape", (q, self.whole(0, self.n_kv_heads, -1, self.head_dim)), f"{name}/q_by_kv_head")
        k = self.add("Transpose", (k,), f"{name}/k_transposed", {"perm": [0, 1, 3, 2]})
        scores = self.add("MatMul", (q, k), f"{name}/products")  # [batch, kv heads, group sequence, total]
        scores = self.add("Reshape", (scores, shared.by_head), f"{name}/products_by_head")
        scores = self.add("Add", (scores, shared.bias[windows_of(self.model)[index]]), f"{name}/scores")
        shares = self.add("Softmax", (scores,), f"{name}/shares_by_head", {"axis": -1})
        shares = self.add("Reshape", (shares, shared.by_kv_head), f"{name}/shares")
        taken = self.add("MatMul", (shares, v), f"{name}/taken")  # [batch, kv heads, group sequence, head]
        taken = self.add("Reshape", (taken, self.whole(0, self.n_heads, -1, self.head_dim)), f"{name}/taken_by_head")
        taken = self.add("Transpose", (taken,), f"{name}/taken_by_token", {"perm": [0, 2, 1, 3]})
        taken = self.add("Reshape", (taken, self.whole(0, 0, -1)), f"{name}/joined")  # [batch, sequence, heads head]
        return self.linear(f"{name}.o_proj", taken)

    def rotated(self, name: str, part: str, x: str, n_heads: int, shared: Shared) -> str:
        """Queries or keys [batch, heads, sequence, head], normed where the family has norms, turned by their angles."""
        y, norm = self.linear(f"{name}.{part}_proj", x), f"{name}.{part}_norm"
        has_norm = f"{norm}.weight" in self.stored
        y = self.heads(y, f"{name}/{part}", n_heads, norm if has_norm else None)
        half, axis = self.head_dim // 2, self.whole(3)
        a = self.add("Slice", (y, self.whole(0), self.whole(half), axis), f"{name}/{part}_a")
        b = self.add("Slice", (y, self.whole(half), self.whole(2 * half), axis), f"{name}/{part}_b")
        products = {
            (side, angle): self.add("Mul", (half, angle), f"{name}/{part}_{side}_{angle}")
            for side, half in (("a", a), ("b", b))
            for angle in (shared.cos, shared.sin)
        }
        first = self.add("Sub", (products["a", shared.cos], products["b", shared.sin]), f"{name}/{part}_first")
        second = self.add("Add", (products["b", shared.cos], products["a", shared.sin]), f"{name}/{part}_second")
        return self.add("Concat", (first, second), f"{name}/{part}_rotated", {"axis": 3})

    def heads(self, y: str, name: str, n_heads: int, norm: str | None = None) -> str:
        """y [batch, sequence, heads head] as [batch, heads, sequence, head]."""
        y = self.add("Reshape", (y, self.whole(0, 0, n_heads, self.head_dim)), f"{name}_by_token")
        y = y if norm is None else self.norm(norm, y)
        return self.add("Transpose", (y,), f"{name}_by_head", {"perm": [0, 2, 1, 3]})

    def norm(self, name: str, x: str) -> str:
        square = self.add("Pow", (x, self.real(2.0)), f"{name}/square")
        mean = self.add("ReduceMean", (square, self.whole(-1)), f"{name}/mean", {"keepdims": 1})
        root = self.add("Sqrt", (self.add("Add", (mean, self.real(self.eps)), f"{name}/mean_eps"),), f"{name}/root")
        unit = self.add("Div", (x, root), f"{name}/unit")
        gain = self.widen(self.stored_tensor(f"{name}.weight"), f"{name}.weight_float32")
        return self.add("Mul", (unit, gain), f"{name}/output")

    # ---- linears ----

    def linear(self, name: str, x: str, output: str | None = None) -> str:
        """x [batch, sequence, in] times the weights of the linear `name`, [batch, sequence, out]."""
        form, has_bias = self.forms.get(name), f"{name}.bias" in self.stored
        output = output or f"{name}/output"
        product = f"{name}/product" if has_bias else output
        if form is None:
            weight = self.widen(self.stored_tensor(f"{name}.weight"), f"{name}.weight_float32")
            self.multiply_dense(x, weight, product)
        else:
            self.multiply_quantized(x, name, form, product)
        if not has_bias:
            return product
        bias = self.widen(self.stored_tensor(f"{name}.bias"), f"{name}.bias_float32")
        return self.add("Add", (product, bias), output)

    def multiply_dense(self, x: str, weight: str, output: str) -> str:
        """By a weight [out, in]."""
        return self.add("MatMul", (x, self.add("Transpose", (weight,), f"{weight}_transposed", {"perm": [1, 0]})), output)

    def multiply_quantized(self, x: str, name: str, form: Form, output: str) -> str:
        parts = tuple(self.stored_tensor(f"{name}.{part}") for part in form.shapes())
        if form.is_nbits:
            n_out, n_in = form.shape
            attributes: dict[str, Attribute] = {"K": n_in, "N": n_out, "bits": form.bits, "block_size": form.group or n_in}
            return self.add("MatMulNBits", (x, *parts), output, attributes | {"accuracy_level": self.accuracy_level})
        attributes = {"axis": 1} if form.group is None else {"axis": 0, "block_size": form.group}
        weight = self.add("DequantizeLinear", parts, f"{name}.weight_decoded", attributes)  # [in, out]
        return self.add("MatMul", (x, weight), output)

    # ---- nodes ----

    def add(self, op: str, inputs: tuple[str, ...], output: str, attributes: dict[str, Attribute] | None = None) -> str:
        self.nodes.append(Node(op, inputs, output, attributes or {}, MICROSOFT if op == "MatMulNBits" else ""))
        return output

    def stored_tensor(self, name: str) -> str:
        self.tensors[name] = None
        return name

    def widen(self, value: str, output: str) -> str:
        """A value in the model's dtype as float32."""
        return value if self.model.dtype == torch.float32 else self.add("Cast", (value,), output, {"to": FLOAT})

    def whole(self, *values: int) -> str:
        """A constant vector of whole numbers."""
        return self.constant(f"whole_{'_'.join(map(str, values))}", torch.tensor(values, dtype=torch.int64))

    def number(self, value: int) -> str:
        """A constant whole number."""
        return self.constant(f"number_{value}", torch.tensor(value, dtype=torch.int64))

    def real(self, value: float) -> str:
        """A constant number."""
        return self.constant(f"real_{value!r}", torch.tensor(value, dtype=torch.float32))

    def constant(self, name: str, tensor: Tensor) -> str:
        self.constants[name] = tensor
        return name


def head_dim_of(model: ModelHandle) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation_of(model: ModelHandle) -> tuple[Tensor, float]:
    """The frequencies [head / 2] float32 of the model's own rotary module, and what it multiplies cos and sin by."""
    rotary = model.model.get_submodule("model.rotary_emb")
    return rotary.get_buffer("inv_freq").float().cpu(), float(cast(float, rotary.attention_scaling))


def windows_of(model: ModelHandle) -> list[int | None]:
    """How many tokens, itself among them, a token sees in each block; None: all before it."""
    config, n_blocks = model.config, model.n_blocks
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_blocks
    return [None if window is None or kind != "sliding_attention" else int(window) for kind in kinds]
