"""How the quantizers of a network are made: the choices that are not bit-widths."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from saq_fx.errors import PrecisionError
from saq_fx.precision import Precision

SCHEMES = ("clip", "lsq")
METHODS = ("mse", "max", "percentile")


@dataclass(frozen=True)
class Recipe:
    """Choices of quantizer scheme, granularity and initial clipping levels.

    Args:
        scheme: "clip" (SAQ Eq. 1-2) or "lsq" (LSQ, ICLR 2020; LSQ+, CVPRW 2020); None takes "lsq" for networks with
            attention and "clip" for the others. An activation that can be negative always gets LSQ+.
        per_channel: one clipping level per output channel of each weight, instead of one per tensor.
        normalize_weights: standardise the weights of convolutions that a BatchNorm follows before quantization ("clip"
            only; APoT, SAQ Sec. 5). It conditions the clipping level; what it takes away, BatchNorm gives back.
        activation_offsets: give every activation a learned offset, LSQ+, not only those that can be negative (the
            paper's MobileNetV2, SAQ Appendix A).
        calibration: how initial clipping levels are set: "mse", "max" or "percentile".
        first_last: precision of the first and last layers; None pins none of them.
        embeddings: quantize embedding tables too, as layers without MACs. They stay in float otherwise: SAQ quantizes
            what is multiplied, and a look-up costs nothing but memory.
        signed: layer name or glob -> whether its input activation is signed, where the producer does not tell.

    Raises:
        PrecisionError: an unknown scheme or calibration method.
    """

    scheme: str | None = None
    per_channel: bool = False
    normalize_weights: bool = True
    activation_offsets: bool = False
    calibration: str = "mse"
    first_last: Precision | None = field(default_factory=lambda: Precision(8, 8))
    embeddings: bool = False
    signed: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scheme not in (None, *SCHEMES):
            raise PrecisionError(f"unknown quantizer scheme {self.scheme!r}: use one of {', '.join(SCHEMES)}")
        if self.calibration not in METHODS:
            raise PrecisionError(f"unknown calibration {self.calibration!r}: use one of {', '.join(METHODS)}")
        if self.first_last is not None:
            object.__setattr__(self, "first_last", Precision.parse(self.first_last))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON data."""
        return {**asdict(self), "first_last": str(self.first_last) if self.first_last else None}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises PrecisionError on an unknown field."""
        unknown = set(data) - {f.name for f in fields(Recipe)}
        if unknown:
            raise PrecisionError(f"unknown recipe fields: {', '.join(sorted(unknown))}")
        return Recipe(**data)
