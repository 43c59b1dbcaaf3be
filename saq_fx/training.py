"""SAQ: sharpness-aware quantization as an optimizer around any other (arXiv 2111.12273)."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from saq_fx.errors import CheckpointError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.pass_base import Pipeline
from saq_fx.passes.insert_perturbations import CASES, InsertPerturbations, perturbed_weights, zero_deltas
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import (
    RandomState,
    ascent_scale,
    global_norm,
    inner_product,
    perturbed,
    preserve_buffers,
)

LOSSES = ("both", "vanilla", "perturbed")
PERTURBABLE = ("bias", "norm", "clipping")


@dataclass(frozen=True)
class StepStatistics:
    """What one step saw; the losses are 0-d tensors, and `cosine` is that of the two gradients, g_s and g.

    `perturbed_loss` is None where no second pass ran; `cosine` also where a gradient is zero or not finite.
    """

    loss: Tensor
    gradient_norm: float
    perturbed_loss: Tensor | None = None
    cosine: float | None = None
    skipped: bool = False

    @property
    def second_pass(self) -> bool:
        """Whether a second forward and backward pass ran."""
        return self.perturbed_loss is not None


class SAQ(Optimizer):
    """Sharpness-aware quantization: minimises `L(Q(w)) + L(Q(w) + eps)`, `eps = rho g/||g||` (SAQ Eq. 15).

    A step takes the gradient g at the quantized weights and g_s at the perturbed ones, and gives their sum to
    the base optimizer. The second pass runs every `period` steps; in between, g_s is
    `g + beta ||g|| g_v/||g_v||`, with g_v the part of the last computed g_s that is orthogonal to its g
    (Algorithm 1, after LookSAM, CVPR 2022). Both passes see the same random numbers, and the second moves no
    buffer.

        opt = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.02, momentum=0.9), rho=0.3)
        loss = opt.step(lambda: loss_fn(gm(x), y))

    It shares `param_groups` and `state` with the base optimizer: learning-rate schedulers take either.
    Build it before the module's first step under `torch.compile` or DDP: it adds leaves to the graph.

    Args:
        gm: a prepared model, whose quantized weights are perturbed through leaves. Weights left in float, and
            those of any other module, are perturbed in place: `losses="perturbed", period=1` is then SAM.
        base_optimizer: any optimizer of parameters of `gm` that steps without a closure.
        rho: radius of the perturbation, in one global norm over all that is perturbed.
        case: where weights are perturbed, 1, 2 or 3: see `InsertPerturbations`.
        period: steps from one second pass to the next; 1 runs it in every step.
        beta: weight of the reused direction between second passes.
        losses: "both"; "vanilla" for `L(Q(w))` alone, plain quantization-aware training; or "perturbed".
        perturb: what is perturbed besides weights: "bias", "norm", "clipping" (the quantizers' parameters).

    Raises:
        TrainingError: an argument makes no sense, or a parameter of the optimizer is not one of `gm`.
    """

    def __init__(
        self,
        gm: nn.Module,
        base_optimizer: Optimizer,
        rho: float = 0.3,
        *,
        case: int = 3,
        period: int = 4,
        beta: float = 0.7,
        losses: str = "both",
        perturb: Collection[str] = ("bias", "norm"),
    ) -> None:
        _check_options(rho, case, period, beta, losses, perturb)
        self._module, self._kinds = gm, parameter_kinds(gm)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self.rho, self.case, self.period, self.beta = rho, case, period, beta
        self.losses, self.perturb = losses, tuple(perturb)
        self.last_step: StepStatistics | None = None
        self.skipped_steps = 0
        self._steps = 0
        # Per parameter: g during a second pass, g_v from then on. The norm is 0 while there is no g_v.
        self._kept: dict[Tensor, Tensor] = {}
        self._kept_norm = 0.0
        self._share_state()
        graphs = [module for module in gm.modules() if isinstance(module, SaqGraphModule)]
        for graph in graphs:
            Pipeline((InsertPerturbations(case),)).run(graph)
        self._weights = [weight for graph in graphs for weight in perturbed_weights(graph)]
        self._behind_quantizer = {parameter for weight in self._weights for parameter in weight.parameters}

    def _share_state(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to both optimizers; raises TrainingError for a parameter that is not in the module."""
        super().add_param_group(param_group)
        for position, parameter in enumerate(param_group["params"]):
            if parameter not in self._kinds:
                self.param_groups.pop()
                raise TrainingError(
                    f"parameter {position} of the group, of shape {tuple(parameter.shape)}, is not in the "
                    "module given to SAQ: build the optimizer from the parameters of the prepared module"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Runs one or both passes, combines the gradients and steps the base optimizer.

        A step whose loss or gradients are not finite changes no parameter, and is counted in `skipped_steps`.

        Args:
            closure: computes the loss, a 0-d tensor; it neither zeroes gradients nor calls backward.

        Returns:
            The unperturbed loss, detached.

        Raises:
            TrainingError: the closure returned no loss, or one that no trained parameter has a part in.
        """
        self._steps += 1
        two_passes = self.losses != "vanilla" and self._steps % self.period == 0
        self.last_step = self._two_passes(closure) if two_passes else self._one_pass(closure)
        if self.last_step.skipped:
            self._count_skipped(self.last_step)
        else:
            self.base_optimizer.step()
        return self.last_step.loss

    def _backward(self, closure: Callable[[], Tensor], factor: float = 1.0) -> Tensor:
        """Leaves the gradients of `factor` times the loss in the parameters, and returns the loss."""
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
            if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
                raise TrainingError(
                    "the closure must return the loss, a 0-d tensor that depends on trainable parameters; "
                    f"it returned {loss!r:.100}"
                )
            loss.backward(torch.full_like(loss, factor))  # type: ignore[no-untyped-call]
        return loss.detach()

    def _with_gradient(self) -> list[nn.Parameter]:
        parameters = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if not parameters:
            raise TrainingError("no parameter of the optimizer got a gradient from the loss: are all frozen?")
        return parameters

    def _one_pass(self, closure: Callable[[], Tensor]) -> StepStatistics:
        """A step without a second pass: g_s is put together from g and the last g_v."""
        factor = 2.0 if self.losses == "both" else 1.0  # g_s + g holds g twice
        loss = self._backward(closure, factor)
        parameters = self._with_gradient()
        norm = float(global_norm(map(_gradient, parameters))) / factor
        if not _all_finite(norm, loss):
            return StepStatistics(loss, norm, skipped=True)
        reused = [parameter for parameter in parameters if parameter in self._kept]
        if reused and self._kept_norm and self.losses != "vanilla":
            directions = [self._kept[parameter] for parameter in reused]
            scale = self.beta * norm / self._kept_norm
            torch._foreach_add_([_gradient(parameter) for parameter in reused], directions, alpha=scale)
        return StepStatistics(loss, norm)

    def _two_passes(self, closure: Callable[[], Tensor]) -> StepStatistics:
        random_state = RandomState(self._kinds)
        with zero_deltas(self._weights) as leaves:
            loss = self._backward(closure)
            parameters = self._with_gradient()
            norm = float(global_norm(map(_gradient, parameters)))
            if not _all_finite(norm, loss):
                return StepStatistics(loss, norm, skipped=True)
            vanilla = self._keep_gradients(parameters)
            with self._ascent(parameters, leaves), preserve_buffers(self._module), random_state.replay():
                perturbed_loss = self._backward(closure)
        sharp = [_gradient(parameter) for parameter in parameters]
        product, sharp_norm = torch.stack([inner_product(sharp, vanilla), global_norm(sharp)]).tolist()
        if not _all_finite(sharp_norm, perturbed_loss):
            return StepStatistics(loss, norm, perturbed_loss, skipped=True)
        projection = product / norm**2 if norm else 0.0
        if self.losses == "both":
            torch._foreach_add_(sharp, vanilla)
            projection += 1.0
        if self.period > 1:
            # g_v = g_s - (g_s.g)/(g.g) g, in the memory of g
            torch._foreach_mul_(vanilla, -projection)
            torch._foreach_add_(vanilla, sharp)
            self._kept_norm = float(global_norm(vanilla))
        cosine = product / (norm * sharp_norm) if norm and sharp_norm else None
        return StepStatistics(loss, norm, perturbed_loss, cosine)

    def _keep_gradients(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Copies the gradients into memory that stays: what data parallelism gives may be overwritten."""
        self._kept_norm = 0.0
        self._kept = {p: self._kept[p] if p in self._kept else torch.empty_like(p) for p in parameters}
        kept = list(self._kept.values())
        torch._foreach_copy_(kept, [_gradient(parameter) for parameter in parameters])
        return kept

    @contextmanager
    def _ascent(self, parameters: list[nn.Parameter], leaves: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Moves all that is perturbed by `rho g/||g||`, from the gradients at hand, and back on leaving."""
        trained = set(parameters)
        active = [not trained.isdisjoint(weight.parameters) for weight in self._weights]
        gradients = [_gradient(source) for source, _ in compress(leaves, active)]
        in_place: list[Tensor] = [p for p in parameters if self._is_perturbed_in_place(p)]
        in_place_gradients = [_gradient(parameter) for parameter in in_place]
        scale = ascent_scale(float(global_norm(gradients + in_place_gradients)), self.rho)
        if gradients:
            torch._foreach_add_([delta for _, delta in compress(leaves, active)], gradients, alpha=scale)
        with perturbed(in_place, in_place_gradients, scale):
            yield

    def _is_perturbed_in_place(self, parameter: nn.Parameter) -> bool:
        return parameter not in self._behind_quantizer and self._kinds[parameter] in ("weight", *self.perturb)

    def _count_skipped(self, step: StepStatistics) -> None:
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            warnings.warn(
                f"SAQ skipped step {self._steps}: loss {float(step.loss):g}, gradient norm "
                f"{step.gradient_norm:g}. Look at the batch, or lower the learning rate or rho. "
                "Further skips are only counted, in skipped_steps.",
                RuntimeWarning,
                stacklevel=5,  # past what torch.optim wraps around step
            )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with this one's step count and reused direction under "saq"."""
        position: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self._parameters())}
        reused = self._kept if self._kept_norm else {}
        own = {
            "steps": self._steps,
            "skipped_steps": self.skipped_steps,
            "direction": {position[parameter]: value for parameter, value in reused.items()},
            "direction_norm": self._kept_norm,
        }
        return {**self.base_optimizer.state_dict(), "saq": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a `state_dict`: the next steps are those that would have followed.

        Raises:
            CheckpointError: the state is that of a plain optimizer.
        """
        if "saq" not in state_dict:
            raise CheckpointError(
                "this is the state of a plain optimizer, not of SAQ: use base_optimizer.load_state_dict()"
            )
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_state()
        parameters, own = self._parameters(), state_dict["saq"]
        self._steps, self.skipped_steps = own["steps"], own["skipped_steps"]
        self._kept_norm = own["direction_norm"]
        # Copies, since what is kept is overwritten in place.
        self._kept = {
            parameters[index]: torch.empty_like(parameters[index]).copy_(value)
            for index, value in own["direction"].items()
        }


def parameter_kinds(module: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter of a module with its kind: "weight", "bias", "norm" or "clipping".

    Clipping are all parameters of quantizers, whatever their shape. Of the others, those with two dimensions
    or more are weights; biases of normalization layers, and all further scales, are norm.
    """
    kinds: dict[nn.Parameter, str] = {}
    for owner in module.modules():
        if isinstance(owner, Quantizer):
            kinds.update(dict.fromkeys(owner.parameters(), "clipping"))
        for name, parameter in owner.named_parameters(recurse=False):
            kinds.setdefault(parameter, _kind(owner, name, parameter))
    return kinds


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() >= 2:
        return "weight"
    # Told by shape, not class: rewritten graphs keep a layer's parameters, but not its class.
    scale = getattr(owner, "weight", None)
    is_norm = isinstance(scale, Tensor) and scale.dim() == 1
    return "bias" if name.endswith("bias") and not is_norm else "norm"


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, with weight decay on weights only: decay on clipping levels would ruin them.

    Args:
        module: a prepared model, or any other.
        weight_decay: that of the weights; biases, norm scale and shift, and quantizer parameters get none.
    """
    trainable = {parameter: kind for parameter, kind in parameter_kinds(module).items() if parameter.requires_grad}
    weights = [parameter for parameter, kind in trainable.items() if kind == "weight"]
    others = [parameter for parameter, kind in trainable.items() if kind != "weight"]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient of a leaf tensor, made of zeros where the loss did not reach it."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def _all_finite(norm: float, loss: Tensor) -> bool:
    return math.isfinite(norm) and math.isfinite(float(loss))


def _check_options(rho: float, case: int, period: int, beta: float, losses: str, perturb: Collection[str]) -> None:
    """Raises TrainingError naming the first option of SAQ that makes no sense."""
    if not 0 <= rho < math.inf:
        raise TrainingError(f"rho must be a finite number of at least 0, not {rho}")
    if case not in CASES:
        raise TrainingError(f"case must be 1, 2 or 3, not {case!r}")
    if not (isinstance(period, int) and period >= 1):
        raise TrainingError(f"period must be a whole number of at least 1, not {period!r}")
    if not math.isfinite(beta):
        raise TrainingError(f"beta must be finite, not {beta}")
    if losses not in LOSSES:
        raise TrainingError(f"losses must be one of {', '.join(LOSSES)}, not {losses!r}")
    unknown = sorted(set(perturb) - set(PERTURBABLE))
    if unknown:
        raise TrainingError(f"perturb takes {', '.join(PERTURBABLE)}, not {', '.join(unknown)}")
