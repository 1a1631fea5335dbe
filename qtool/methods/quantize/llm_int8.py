"""LLM.int8(): weights and inputs in eight bits, but channels of inputs with outliers, which stay in 16.

    y = x_O W_Oᵀ + s_x s_wᵀ ⊙ (x8 w8ᵀ)      O = {j : max over tokens |x_j| >= threshold}, in each call anew
    x8 = nearest(x / s_x),  s_x = max over j not in O of |x_j| / 127, of each token;  w8, s_w: rounding to nearest, by rows
x [tokens, in]    W [out, in]    s_x [tokens, 1]    s_w [out, 1]    x_O, W_O: the columns of O alone
This method gives the weights; what the scheme's threshold says of inputs QuantLinear does, see formats/inputs.py.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 3 and equation 8.
Differs: W_O is what the codes decode to, as in bitsandbytes, and not 16-bit weights, which a checkpoint of codes has no more;
the scale of a row is qtool's own for eight bits, a hundredth finer than max |W| / 127. O depends on all tokens of a call, so
that a window is not computed quite as the same tokens one by one. bitsandbytes leaves single outliers, not their columns, out
of s_x.
For: transformers with bitsandbytes, and large models (from 6.7 billion weights, says the paper) whose few outlying channels
ruin int8 inputs; w8a8 after transform/smoothquant runs faster, as nothing is looked for while running.
Costs: no text, no time. While running a look through every input, and a second, small product in 16 bits.
"""

from collections.abc import Callable

from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme, SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.registry import Method

DEFAULT = "w8-aint8t6"


class LlmInt8Options(SchemeSelection):
    """The scheme's threshold leaves nothing else to choose."""

    scheme: Scheme = Field(
        Scheme.model_validate(DEFAULT),
        description="w8-aint8t and the threshold from which on channels stay in 16 bits: w8-aint8t6, the paper's",
    )

    @model_validator(mode="after")
    def _decompose(self) -> "LlmInt8Options":
        for scheme in (self.scheme, *self.modules.values()):
            inputs = scheme.activations
            if scheme.weights != WeightScheme(bits=8) or inputs is None or inputs.bits != 8 or inputs.threshold is None:
                raise ValueError(f"{scheme} is no scheme of LLM.int8(); write w8-aint8t and a threshold, such as {DEFAULT}")
        return self


def llm_int8(
    W: Tensor, stats: LayerStats | None, scheme: WeightScheme, options: LlmInt8Options, note: Callable[[str], None]
) -> QuantizedTensor:
    """W [out, in] in eight bits, a scale for each row."""
    return quantize(W, scheme)


METHOD = Method(run=llm_int8, options=LlmInt8Options, scope="linear", rowwise=True, schemes=(DEFAULT,))
