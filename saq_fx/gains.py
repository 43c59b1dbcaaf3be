"""What the candidates of mixtures gain, told from the noisy gains of single steps."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from saq_fx.mixtures import MixtureQuantizer


@torch.no_grad()
def add_gains(totals: Tensor, mixture: MixtureQuantizer) -> None:
    """Adds what one step tells: the gain in loss, to first order, of each candidate over the widest one.

    That is `dL/dp_w - dL/dp_b`; by the derivative of the softmax, `-T/p_b dL/dz_b` is the gain over the mixture.

    Args:
        totals: (2, candidates): the sums over steps of the gains, and of their squares.
        mixture: after a backward pass; without a gradient, nothing is added.
    """
    if mixture.logits.grad is not None:
        probabilities = mixture.probabilities().clamp_min(torch.finfo(totals.dtype).tiny)
        gain = -mixture.logits.grad * mixture.temperature / probabilities
        gain = gain - gain[mixture.candidates.index(max(mixture.candidates))]
        totals += torch.stack([gain, gain**2])


def expected_gains(totals: Sequence[Tensor], candidates: Sequence[tuple[int, ...]], steps: int) -> list[Tensor]:
    """The gain of every candidate over the widest one: the mean of the steps, less the noise that can be told.

    Errors of quantization shrink alike with every bit, whatever the tensor, and a mixture's sensitivity is a factor
    (HAWQ-V2, arXiv 1911.03852, Eq. 6): what widths cost has one shape. With m and v the mean over N steps and its
    variance, of candidate b of mixture j; sums over the widths but the widest, and all mixtures of the same widths:

        s_b = sum_j m_jb                                                        the shape
        c_j = max(0, sum_b m_jb s_b/v_jb / sum_b s_b^2/v_jb)                    weighted least squares
        t^2 = max(0, sum_jb (m_jb - c_j s_b)^2/v_jb - (J - 1)(B - 1)) / sum_jb s_b^2/v_jb
        gain_jb = c_j s_b + (m_jb - c_j s_b) t^2 s_b^2/(t^2 s_b^2 + v_jb)

    for J mixtures and B widths. The last two are empirical Bayes: t s_b is how much mixtures depart from the shape
    beyond their noise; where that is little against the noise of m, the shape is believed. After many steps the mean
    is, and after a single one, which tells of no noise.

    Args:
        totals: of each mixture, as `add_gains` makes them.
        candidates: the bits of each mixture.
        steps: N.
    """
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, bits in enumerate(candidates):
        alike[bits].append(index)
    gains: dict[int, Tensor] = {}
    for bits, members in alike.items():
        mean, square = (torch.stack([totals[index] for index in members]).cpu().double() / steps).unbind(1)
        variance = (square - mean**2).clamp_min(0) / max(1, steps - 1)
        others = [position for position, each in enumerate(bits) if each < max(bits)]
        found = torch.zeros_like(mean)
        found[:, others] = _shrunk(mean[:, others], variance[:, others])
        gains.update(zip(members, found.to(totals[members[0]]), strict=True))
    return [gains[index] for index in range(len(totals))]


def _shrunk(mean: Tensor, variance: Tensor) -> Tensor:
    """Each (mixtures, widths), as `expected_gains` writes it; the mean itself where it has no noise."""
    certainty = torch.where(variance > 0, 1 / variance, 0)
    shape, tiny = mean.sum(0), torch.finfo(mean.dtype).tiny
    signal = shape**2 * certainty
    scale = (mean * shape * certainty).sum(1) / signal.sum(1).clamp_min(tiny)
    fit = scale.clamp_min(0)[:, None] * shape
    rest, freedom = mean - fit, (len(mean) - 1) * (mean.shape[1] - 1)
    excess = ((rest**2 * certainty).sum() - freedom).clamp_min(0)
    departure = excess / signal.sum().clamp_min(tiny) * signal
    return torch.where(variance > 0, fit + rest * departure / (departure + 1), mean)
