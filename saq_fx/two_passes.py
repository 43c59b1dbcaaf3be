"""The two gradients of a sharpness-aware search step, with one evaluation of each mixture of weights for both."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saq_fx.errors import TrainingError
from saq_fx.mixtures import HeldMixture, MixtureQuantizer
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import RandomState, ascent_scale, global_norm, inner_product, perturbed, preserve_buffers


@dataclass(frozen=True)
class Losses:
    """Both losses of a step, and the cosine of their gradients with respect to all that is perturbed."""

    loss: float
    perturbed_loss: float
    cosine: float


class TwoPasses:
    """Leaves the gradient that a sharpness-aware step descends along in `grad` of every parameter of a module.

    With theta all that is perturbed: `g = grad L(theta)`, `g_a = grad L(theta + (radius/||g|| - alignment) g)`,
    and the step's gradient is their mean (SAGM, CVPR 2023, Eq. 8), or g_a with alignment None (SAM, ICLR 2021).

    Weights that a mixture quantizes are perturbed behind it (case 3 of SAQ): it is evaluated once for both passes, and
    their gradients go back through it together. All parameters that are in front of no such mixture are perturbed in
    place, except quantizers' own levels. The second pass sees the first one's random numbers and moves no buffer.

    A context: what it keeps between steps (mixed weights and large gradients, whose memory is used again) is freed on
    leaving.

    Args:
        module: whose mixtures, parameters and buffers these are.
        weights: the mixtures of weights.
    """

    def __init__(self, module: nn.Module, weights: list[MixtureQuantizer]) -> None:
        self.module, self.weights = module, weights
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        quantizers = (each for each in module.modules() if isinstance(each, Quantizer))
        self.levels = {level for quantizer in quantizers for level in quantizer.parameters()}
        self.held: list[HeldMixture] = []
        self.spare: dict[Tensor, Tensor] = {}  # a second gradient for each leaf
        self.behind: dict[Tensor, Tensor] = {}  # the gradients of what only mixtures use

    def __enter__(self) -> "TwoPasses":
        for mixture in self.weights:
            mixture.held = HeldMixture()
            self.held.append(mixture.held)
        return self

    def __exit__(self, *_: object) -> None:
        for mixture in self.weights:
            mixture.held = None
        for parameter in self.parameters:
            parameter.grad = None
        self.held, self.spare, self.behind = [], {}, {}

    def run(self, closure: Callable[[], Tensor], radius: float, alignment: float | None) -> Losses:
        """Both passes, or one at radius 0.

        Args:
            closure: computes the loss, a 0-d tensor.
            radius, alignment: in one global norm over all that is perturbed.

        Raises:
            TrainingError: a loss is no 0-d tensor with a gradient, or one of them is not finite.
        """
        random_state = RandomState(self.parameters)
        self._clear()
        loss = perturbed_loss = self._differentiate(closure)
        leaves = self._leaves()
        seen = [each for each in (*leaves, *self.parameters) if each.grad is not None]
        fixed = self.levels | _sources(held.mixed for held in leaves.values())
        moved = [each for each in seen if each not in fixed]
        norm, cosine = self._norm(loss, moved), 1.0
        if radius:
            first = {each: self._set_aside(each) for each in seen}
            scale = ascent_scale(norm, radius) - (alignment or 0.0)
            with self._perturbed(moved, first, scale), preserve_buffers(self.module), random_state.replay():
                perturbed_loss = self._differentiate(closure)
            norms = norm * self._norm(perturbed_loss, moved)
            product = inner_product([first[each] for each in moved], map(_gradient, moved))
            cosine = float(product) / norms if norms else 0.0
            for each, kept in first.items():
                second = _gradient(each)
                each.grad = kept.lerp_(second, 1.0 if alignment is None else 0.5)
                if each in leaves:
                    self.spare[each] = second
        self._push_back()
        return Losses(loss, perturbed_loss, cosine)

    def _leaves(self) -> dict[Tensor, HeldMixture]:
        """The mixed weights of this step."""
        return {each.leaf: each for each in self.held if each.leaf is not None and each.mixed is not None}

    def _clear(self) -> None:
        for held in self.held:
            held.release()  # from what was run between steps
            if held.leaf is not None and held.leaf.grad is not None:
                held.leaf.grad.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def _differentiate(self, closure: Callable[[], Tensor]) -> float:
        loss = closure()
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            raise TrainingError(
                f"the loss must be a 0-d tensor that depends on trainable parameters; it is {loss!r:.100}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _norm(self, loss: float, tensors: list[Tensor]) -> float:
        norm = float(global_norm(map(_gradient, tensors)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss:g} with gradient norm {norm:g}: look at the batch, or lower the learning rates"
            )
        return norm

    def _set_aside(self, tensor: Tensor) -> Tensor:
        """Takes the gradient of the first pass, and makes room for that of the second."""
        gradient, spare = _gradient(tensor), self.spare.pop(tensor, None)
        tensor.grad = None if spare is None else spare.zero_()
        return gradient

    @contextmanager
    def _perturbed(self, tensors: list[Tensor], gradients: dict[Tensor, Tensor], scale: float) -> Iterator[None]:
        leaves = self._leaves()
        mixed, others = ([each for each in tensors if (each in leaves) is held] for held in (True, False))
        if mixed:
            # They need not be moved back: the next step mixes anew.
            with torch.no_grad():
                torch._foreach_add_(mixed, [gradients[each] for each in mixed], alpha=scale)
        with perturbed(others, [gradients[each] for each in others], scale):
            yield

    def _push_back(self) -> None:
        """Takes the gradients at the mixed weights back through the mixtures."""
        pairs = [(held.mixed, leaf.grad) for leaf, held in self._leaves().items()]
        mixed = {output: grad for output, grad in pairs if output is not None and grad is not None}
        behind = [parameter for parameter in self.parameters if parameter.grad is None]
        for parameter in behind:
            if parameter in self.behind:
                parameter.grad = self.behind[parameter].zero_()
        if mixed:
            torch.autograd.backward(list(mixed), list(mixed.values()))
        self.behind = {parameter: parameter.grad for parameter in behind if parameter.grad is not None}
        for held in self.held:
            held.release()  # who runs the module between steps must not see moved weights


def _sources(tensors: Iterable[Tensor | None]) -> set[Tensor]:
    """The leaves that tensors are computed from."""
    ahead = [each.grad_fn for each in tensors if each is not None]
    met: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in met:
            met.add(node)
            ahead += [following for following, _ in node.next_functions]
    return {node.variable for node in met if hasattr(node, "variable")}


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient that was just computed; zeros where the tensor had no part."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
