"""Mixtures over bit-widths: what the search puts in the place of a quantizer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saq_fx.errors import PrecisionError
from saq_fx.precision import FLOAT_BITS
from saq_fx.quantizers import Quantizer


class MixtureQuantizer(nn.Module):
    """`sum_b softmax(z/T)_b Q_b(x)`: every candidate width at once, each with its own levels (EdMIPS, Sec. 4).

    Args:
        quantizers: one candidate for each width, of different widths, none of them float.
        logits: z, of shape (candidates,); several mixtures that share a choice are given the same parameter.

    Raises:
        PrecisionError: the candidates' widths repeat, one is float, or the logits are of another number.
    """

    def __init__(self, quantizers: Sequence[Quantizer], logits: nn.Parameter) -> None:
        super().__init__()
        bits = [quantizer.bits for quantizer in quantizers]
        if not bits or len(set(bits)) < len(bits) or FLOAT_BITS in bits or logits.shape != (len(bits),):
            raise PrecisionError(
                f"a mixture of {bits} bits with logits of shape {tuple(logits.shape)}: give different widths of 2 to "
                "8 bits and one logit for each"
            )
        self.quantizers = nn.ModuleList(quantizers)
        self.logits = logits
        self.temperature = 1.0

    @property
    def candidates(self) -> tuple[int, ...]:
        """Bits of each candidate."""
        return tuple(int(quantizer.bits) for quantizer in self.quantizers)  # type: ignore[arg-type]

    def probabilities(self) -> Tensor:
        """How much of each candidate is in the mixture, (candidates,)."""
        return (self.logits / self.temperature).softmax(0)

    def expected_bits(self) -> Tensor:
        """`sum_b p_b b`, a 0-d tensor."""
        probabilities = self.probabilities()
        return (probabilities * probabilities.new_tensor(self.candidates)).sum()

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of the quantized tensors, of the shape and type of `x`."""
        weights = self.probabilities().to(x.dtype)
        first, *others = self.quantizers
        mixed: Tensor = weights[0] * first(x)
        for weight, quantizer in zip(weights[1:], others, strict=True):
            mixed = torch.addcmul(mixed, weight, quantizer(x))
        return mixed

    def extra_repr(self) -> str:
        """The candidates' bits."""
        return f"candidates={self.candidates}"
