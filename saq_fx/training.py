"""SAQ: sharpness-aware quantization as an optimizer around any other (arXiv 2111.12273)."""

import math
import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from saq_fx.ascent_step import AscentStep
from saq_fx.batching import Chunk, cut
from saq_fx.direction import Direction
from saq_fx.errors import CheckpointError, TrainingError
from saq_fx.gradients import add_gradients, all_finite, gradient_of
from saq_fx.parallel import Workers, local
from saq_fx.parameters import parameter_kinds
from saq_fx.passes.insert_perturbations import moved_share
from saq_fx.precision import FLOAT_BITS
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import RandomState, inner_product
from saq_fx.state import ForwardState, preserve_state
from saq_fx.step import StepStatistics, check_base_optimizer, check_cuts, check_options


class SAQ(Optimizer):
    """Sharpness-aware quantization: minimises `L(Q(w)) + L(Q(w) + eps)`, `eps = rho g/||g||` (SAQ Eq. 15).

    A step takes the gradient g at the quantized weights and g_s at the perturbed ones, and gives their sum to
    the base optimizer. The second pass runs every `period` steps; in between, g_s is
    `g + beta ||g|| g_v/||g_v||`, with g_v the part of the last computed g_s that is orthogonal to its g
    (Algorithm 1, after LookSAM, CVPR 2022). Both passes see the same random numbers, and the second moves no
    buffer.

        opt = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.02, momentum=0.9), rho=0.3)
        loss = opt.step(lambda: loss_fn(gm(x), y))
        loss = opt.step(lambda x, y: loss_fn(gm(x), y), x, y)   # a batch that it may cut

    It shares `param_groups` and `state` with the base optimizer: learning-rate schedulers take either.
    Build it before the module's first step under `torch.compile`, and after wrapping the module in DDP or sharding it
    (FSDP2): under DDP every worker perturbs by its own gradient, under FSDP2 all by the average.

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
        adaptive: perturb every value v in proportion to its size, by `rho v**2 g / ||v g||` (ASAM, ICML 2021).
        chunk_size: samples per forward pass; the batch is cut into chunks whose gradients are accumulated, each
            perturbed by its own (m-sharpness, SAQ Sec. 5, with m = chunk_size).
        second_pass_fraction: share of the samples on which the second pass runs: those of the largest losses if the
            closure returns one for each, which costs less accuracy, else the first ones.
        max_gradient_norm: what the base optimizer receives is clipped to this norm.
        grad_scaler: scales the losses of float16 autocast; SAQ scales, unscales and updates it.

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
        adaptive: bool = False,
        chunk_size: int | None = None,
        second_pass_fraction: float = 1.0,
        max_gradient_norm: float | None = None,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        perturb = (perturb,) if isinstance(perturb, str) else tuple(perturb)
        check_options(rho, case, period, beta, losses, perturb)
        check_cuts(chunk_size, second_pass_fraction, max_gradient_norm)
        check_base_optimizer(base_optimizer)
        if isinstance(base_optimizer, SAQ):
            raise TrainingError("the base optimizer is a SAQ already: give it to SAQ once, or take its base_optimizer")
        if not isinstance(gm, nn.Module):
            raise TrainingError(f"SAQ takes the module that the closure runs, not {type(gm).__name__}")
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise TrainingError(f"grad_scaler is a torch.amp.GradScaler, not {type(grad_scaler).__name__}")
        self._module, self._kinds, self._workers = gm, parameter_kinds(gm), Workers.of(gm)
        self._check_levels()
        if adaptive and self._workers.sharded:
            raise TrainingError("adaptive=True needs whole weights: it does not work with sharded parameters (FSDP2)")
        if self._workers.has_static_graph and period == 1:
            raise TrainingError("static_graph=True needs a synchronised pass: use a period above 1, or leave it out")
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self.grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self.rho, self.period, self.beta, self.losses = rho, period, beta, losses
        self.chunk_size, self.second_pass_fraction = chunk_size, second_pass_fraction
        self.max_gradient_norm = max_gradient_norm
        self.last_step: StepStatistics | None = None
        self.skipped_steps = 0
        self._steps = 0
        self._direction = Direction()
        self._ascent = AscentStep(gm, self._kinds, self._workers, case=case, perturb=perturb, adaptive=adaptive)

    def _check_levels(self) -> None:
        for name, module in self._module.named_modules():
            unset = isinstance(module, Quantizer) and not module.initialized and module.bits != FLOAT_BITS
            if unset and self._workers.several:
                raise TrainingError(
                    f"the clipping level of {name} is not set, and workers would set different ones: run "
                    "saq_fx.calibrate(gm, batches) before the graph is wrapped"
                )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        base = self.__dict__.get("base_optimizer")
        groups: list[dict[str, Any]] = self.__dict__["_own_groups"] if base is None else base.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._own_groups = groups  # while torch's constructor checks them

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        base = self.__dict__.get("base_optimizer")
        return {} if base is None else base.state

    @state.setter
    def state(self, state: Any) -> None:
        """Of torch's constructor: there is none yet."""

    def __getstate__(self) -> dict[str, Any]:
        raise TrainingError("SAQ is part of its module and cannot be copied: copy the module, and state_dict()")

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
    def step(self, closure: Callable[..., Tensor] | None = None, *batch: Any) -> Tensor:  # type: ignore[override]
        """Runs one or both passes, combines the gradients and steps the base optimizer.

        A step whose loss or gradients are not finite changes no parameter and no buffer, and is counted in
        `skipped_steps`.

        Args:
            closure: computes the mean loss, a 0-d tensor, or the loss of each sample, (samples,), of which the mean is
                taken; it neither zeroes gradients nor calls backward.
            batch: what the closure is called with: tensors, in any nesting, with the samples along their first axis.
                Needed where the batch is cut (`chunk_size`, `second_pass_fraction`).

        Returns:
            The unperturbed loss, detached; the mean over data-parallel workers.

        Raises:
            TrainingError: the closure returned no loss, or one that no trained parameter has a part in; the batch
                cannot be cut.
        """
        if not callable(closure):
            raise TrainingError(
                "step() takes a closure that computes the loss, since it runs it twice: "
                "opt.step(lambda: loss_fn(gm(x), y)). A GradScaler goes into SAQ(..., grad_scaler=scaler), "
                "and torch.distributed.checkpoint takes opt.base_optimizer"
            )
        self._workers.check_step()
        parts = cut(closure, batch, self.chunk_size, self.second_pass_fraction)
        two_passes = self.losses != "vanilla" and (self._steps + 1) % self.period == 0
        state = ForwardState(self._module)
        self.last_step = self._two_passes(parts) if two_passes else self._one_pass(parts)
        self._steps += 1
        if self.last_step.skipped:
            state.restore()
            self._count_skipped(self.last_step)
        self._update(self.last_step.skipped)
        return self.last_step.loss

    def _update(self, skipped: bool) -> None:
        """Steps the base optimizer; the scaler of float16 losses also learns of steps that are skipped."""
        scaler, parameters = self.grad_scaler, self._parameters()
        if scaler is not None:
            if skipped:  # the loss alone may not have been finite, and the scaler looks at gradients
                next(p.grad for p in parameters if p.grad is not None).fill_(math.inf)
            scaler.unscale_(self.base_optimizer)
        elif skipped:
            return
        if self.max_gradient_norm is not None and not skipped:
            nn.utils.clip_grad_norm_(parameters, self.max_gradient_norm)
        if scaler is None:
            self.base_optimizer.step()
        else:
            scaler.step(self.base_optimizer)
            scaler.update()

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()

    def _backward(self, closure: Callable[[], Tensor], factor: float) -> Tensor:
        """Adds the gradients of `factor` times the mean loss to those of the parameters, and returns the loss."""
        gradients = [parameter.grad for parameter in self._parameters()]
        with torch.enable_grad():
            loss = closure()
            if any(each.grad is not before for each, before in zip(self._parameters(), gradients, strict=True)):
                raise TrainingError("the closure must neither zero gradients nor call backward: SAQ does both")
            if not (isinstance(loss, Tensor) and loss.dim() <= 1 and loss.numel() and loss.requires_grad):
                raise TrainingError(
                    "the closure must return the mean loss, a 0-d tensor, or the loss of each sample, (samples,), that "
                    f"depends on trainable parameters; it returned {loss!r:.100}"
                )
            mean = loss.mean()
            scaled = mean if self.grad_scaler is None else self.grad_scaler.scale(mean)
            scaled.backward(torch.full_like(scaled, factor))  # type: ignore[no-untyped-call]
        return loss.detach()

    def _reached(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.grad is not None]

    def _with_gradient(self) -> list[nn.Parameter]:
        """Parameters that the loss reached; where workers hold shards, that of any worker."""
        reached = self._reached()
        if not reached:
            raise TrainingError("no parameter of the optimizer got a gradient from the loss: are all frozen?")
        for parameter in reached:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                name = next(name for name, each in self._module.named_parameters() if each is parameter)
                raise TrainingError(f"the gradient of {name} is sparse: make its layer with sparse=False")
        return self._of_any_worker(reached) if self._workers.sharded else reached

    def _of_any_worker(self, reached: Collection[Tensor]) -> list[nn.Parameter]:
        """Parameters that are among those reached on any worker, in the same order on all."""
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        among = set(reached)
        anywhere = self._workers.any_of([parameter in among for parameter in trained], trained[0].device)
        return list(compress(trained, anywhere))

    def _one_pass(self, parts: list[Chunk]) -> StepStatistics:
        """A step without a second pass: g_s is put together from g and the last g_v."""
        factor = 2.0 if self.losses == "both" else 1.0  # g_s + g holds g twice
        self.zero_grad()
        losses = []
        for index, part in enumerate(parts, 1):
            with nullcontext() if index == len(parts) else self._workers.unsynchronized():
                losses.append(part.share * self._backward(part.first, factor * part.share).mean())
        loss = torch.stack(losses).sum()
        self._workers.average([loss])
        parameters = self._with_gradient()
        norm = self._workers.norm([gradient_of(parameter) for parameter in parameters]) / factor
        if not all_finite(norm, loss):
            return StepStatistics(loss, norm / self._loss_scale, skipped=True)
        if self.losses != "vanilla":
            self._direction.add_to({parameter: gradient_of(parameter) for parameter in parameters}, self.beta * norm)
        return StepStatistics(loss, norm / self._loss_scale)

    def _two_passes(self, parts: list[Chunk]) -> StepStatistics:
        """A step with both passes, for each part of the batch; g and g_s are their sums."""
        memory = self._direction.forget()
        vanilla, sharp = dict[Tensor, Tensor](), dict[Tensor, Tensor]()
        # Workers that synchronise and GPUs that replay graphs may write to gradients again.
        lasting = not self._workers.several and not any(parameter.is_cuda for parameter in self._parameters())
        losses, perturbed_losses, moved = [], [], None
        for index, part in enumerate(parts, 1):
            last = index == len(parts)
            with self._ascent.leaves() as leaves:
                random_state = RandomState(self._kinds)
                self.zero_grad()
                # Each worker perturbs by its own gradient, and they agree on the sums only.
                with self._workers.unsynchronized():
                    each_loss = self._backward(part.first, part.share)
                loss = each_loss.mean()
                parameters = self._with_gradient()
                ascent = self._ascent.find(parameters, leaves)
                finite = all_finite(ascent.norm, loss)
                # Workers may have different numbers of parts, and meet once: at the last, or where one gives up.
                if last or not finite or self._workers.sharded:
                    finite = self._workers.all_agree(finite, loss.device)
                if not finite:
                    return StepStatistics(loss, ascent.norm / self._loss_scale, skipped=True)
                add_gradients(vanilla, parameters, memory, keep=lasting)
                before = self._ascent.weight_codes()
                with ascent.climbed(self.rho), preserve_state(self._module), random_state.replay():
                    moved = moved_share(before, self._ascent.weight_codes())
                    self.zero_grad()
                    if last and self._workers.finds_unused:
                        for each in vanilla:  # DDP fails on those that only earlier passes have used
                            gradient_of(each)
                    with self._workers.unsynchronized(last):
                        perturbed_loss = self._backward(partial(part.second, each_loss), part.share).mean()
            if len(parts) > 1:
                add_gradients(sharp, self._reached(), {}, keep=lasting)
            losses.append(part.share * loss)
            perturbed_losses.append(part.share * perturbed_loss)
        loss, perturbed_loss = torch.stack(losses).sum(), torch.stack(perturbed_losses).sum()
        self._workers.average([loss, perturbed_loss])
        for parameter, gradient in sharp.items():
            gradient_of(parameter).copy_(gradient)
        if self._workers.several:
            everywhere = self._of_any_worker(vanilla)
            vanilla = {each: vanilla.get(each, torch.zeros_like(local(each.detach()))) for each in everywhere}
        return self._combine(vanilla, loss, perturbed_loss, moved)

    def _combine(
        self, vanilla: dict[Tensor, Tensor], loss: Tensor, perturbed_loss: Tensor, moved: float | None
    ) -> StepStatistics:
        """Makes g_s, in the parameters, what the objective asks for, and keeps g_v in the memory of g."""
        g, g_s = list(vanilla.values()), [gradient_of(parameter) for parameter in vanilla]
        self._workers.average_gradients([*g, *g_s])
        squares = torch.stack([inner_product(g, g), inner_product(g_s, g), inner_product(g_s, g_s)])
        square, product, sharp_square = self._workers.sum_of_shards(squares).tolist()
        norm, sharp_norm = math.sqrt(square), math.sqrt(sharp_square)
        statistics = StepStatistics(
            loss,
            norm / self._loss_scale,
            perturbed_loss,
            sharp_norm / self._loss_scale,
            product / (norm * sharp_norm) if norm and sharp_norm else None,
            moved,
        )
        if not all_finite(norm + sharp_norm, loss + perturbed_loss):
            return replace(statistics, cosine=None, skipped=True)
        projection = product / square if square else 0.0
        if self.losses == "both":
            torch._foreach_add_(g_s, g)
            projection += 1.0
        if self.period > 1:
            # g_v = g_s - (g_s.g)/(g.g) g
            torch._foreach_mul_(g, -projection)
            torch._foreach_add_(g, g_s)
            self._direction.keep(vanilla, self._workers.norm(g))
        return statistics

    def _count_skipped(self, step: StepStatistics) -> None:
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            remedy = "Look at the batch, or lower the learning rate or rho."
            if self.grad_scaler is not None:
                remedy = f"The scaler tries lower scales than {self._loss_scale:g}, as it should at the beginning."
            warnings.warn(
                f"SAQ skipped step {self._steps}: loss {float(step.loss):g}, gradient norm "
                f"{step.gradient_norm:g}. {remedy} "
                "Further skips are only counted, in skipped_steps.",
                RuntimeWarning,
                stacklevel=5,  # past what torch.optim wraps around step
            )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with this one's step count and reused direction under "saq".

        Of sharded parameters (FSDP2) it holds this worker's shards. `torch.distributed.checkpoint` knows the base
        optimizer's part only: give it `base_optimizer`, and keep what "saq" holds beside it.
        """
        position: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self._parameters())}
        own = {
            "steps": self._steps,
            "skipped_steps": self.skipped_steps,
            "direction": {position[parameter]: value for parameter, value in self._direction.values.items()},
            "direction_norm": self._direction.norm,
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
        parameters, own = self._parameters(), state_dict["saq"]
        self._steps, self.skipped_steps = own["steps"], own["skipped_steps"]
        # Copies, since what is kept is overwritten in place.
        values: dict[Tensor, Tensor] = {
            parameters[index]: torch.empty_like(local(parameters[index].detach())).copy_(value)
            for index, value in own["direction"].items()
        }
        self._direction.keep(values, own["direction_norm"])
