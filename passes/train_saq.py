"""Trains a quantized graph, on whatever devices there are."""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from saq_fx.annotation import record_of
from saq_fx.distillation import distillation_loss
from saq_fx.errors import CheckpointError, MissingExtraError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import Batch, ExampleInputs, split_batch, split_inputs
from saq_fx.parameters import parameter_groups
from saq_fx.pass_base import FACTS, Pass, PassResult, Pipeline, check_facts
from saq_fx.passes.insert_perturbations import RemovePerturbations
from saq_fx.passes.reestimate_batchnorm import ReestimateBatchNorm
from saq_fx.precision import write_whole
from saq_fx.quantizers import Quantizer
from saq_fx.report import precision_report
from saq_fx.resume import Generators, differences
from saq_fx.shapes import evaluating
from saq_fx.training import SAQ
from saq_fx.training_recipe import TrainingRecipe

_PARTS = {"identity", "step", "model", "optimizer", "schedule", "scaler", "random"}
_LOWER_TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batches(Protocol):
    """(inputs, targets) of a known number, to be iterated more than once: a list, or a `DataLoader`."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TrainSaq(Pass):
    """Trains a quantized graph with SAQ (arXiv 2111.12273) and prints what every layer costs.

    Devices, precision and processes are accelerate's: start the script by `torchrun` or `accelerate launch` to train
    on several. With a folder, the run leaves a checkpoint there every so many steps, and scalars for TensorBoard:
    both losses, the cosine of their gradients, norms, rho, learning rate and clipping levels. Started again with the
    same folder, it goes on where it stopped, and ends, on a CPU, as if it had not: to the last bit, unless persistent
    workers of a loader draw random numbers, or forward keeps state in attributes. Modules in evaluation mode (frozen
    BatchNorm) stay so if the graph as a whole is in training mode.

    Args:
        batches: (inputs, targets), iterated once an epoch: a `DataLoader`, which several processes share out, or a
            list. Inputs are as for `example_inputs`.
        loss_fn: of outputs and targets, the mean loss, or that of each sample: see `second_pass_fraction` of `SAQ`.
        recipe: schedule, optimizer and the settings of SAQ.
        teacher: the float model to distil from, if the recipe asks for it; it is left in evaluation mode. Its outputs
            and the graph's are logits, (samples, classes, ...).
        folder: for `checkpoint.pt` and `tensorboard/`.
        checkpoint_every: steps.
        mixed_precision: "bf16", "fp16" or "no"; None leaves it to `accelerate launch`.
        compile: whether to run the graph through `torch.compile`.

    Raises:
        TrainingError: settings that make no sense; batches without a length.
        CheckpointError: the folder's checkpoint is of another run.
        MissingExtraError: accelerate or tensorboard is not installed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    batches: Batches
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy
    recipe: TrainingRecipe = field(default_factory=TrainingRecipe)
    teacher: nn.Module | None = None
    folder: str | os.PathLike[str] | None = None
    checkpoint_every: int = 1000
    mixed_precision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        try:
            length = len(self.batches)
        except TypeError as error:
            raise TrainingError("batches must have a length, as lists have: the schedule depends on it") from error
        if not length:
            raise TrainingError("batches is empty: has the data fewer samples than a batch?")
        if bool(self.recipe.distillation) != (self.teacher is not None):
            raise TrainingError("distillation takes both: a teacher, and its weight in the recipe (distillation=...)")
        if self.mixed_precision not in (None, *_LOWER_TYPES):
            raise TrainingError(f"mixed_precision is one of {', '.join(_LOWER_TYPES)}, not {self.mixed_precision!r}")
        if self.checkpoint_every < 1:
            raise TrainingError(f"checkpoint_every must be a number of steps, at least 1, not {self.checkpoint_every}")

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes weights, clipping levels and statistics, not the graph, which is left on the training device."""
        check_facts(gm, self.needs, self.name)
        had_leaves = record_of(gm).perturbation_case is not None
        run = _Run(self, gm)
        run.resume()
        run.train()
        Pipeline((RemovePerturbations(),)).run(gm)
        if self.recipe.reestimation_batches:
            inputs = (split_batch(batch)[0] for batch in islice(self.batches, self.recipe.reestimation_batches))
            ReestimateBatchNorm(inputs).run(gm)
        if run.accelerator.is_main_process and FACTS["shapes"](gm) is None:
            print(precision_report(gm))
        return PassResult(gm, modified=had_leaves)


class _Run:
    """A training run in progress."""

    def __init__(self, options: TrainSaq, gm: SaqGraphModule) -> None:
        recipe = options.recipe
        self.options, self.gm = options, gm
        self.accelerator = _accelerator()
        self.device = self.accelerator.device
        # Not through accelerate, where the first choice in a process is the last.
        lower = options.mixed_precision or self.accelerator.mixed_precision
        self.lower_type = _LOWER_TYPES.get(lower)
        self.scaler = GradScaler(self.device.type) if self.lower_type is torch.float16 else None
        gm.to(self.device)
        if not gm.training:
            gm.train()
        several = self.accelerator.num_processes > 1
        if several:
            self._set_levels()
        devices = [self.device] if several and self.device.type == "cuda" else None
        module = DistributedDataParallel(gm, device_ids=devices) if several else gm
        base = _base_optimizer(recipe, gm)
        self.optimizer = SAQ(module, base, **recipe.saq_options(), grad_scaler=self.scaler)
        self.forward: Callable[..., Any] = torch.compile(module) if options.compile else module
        self.batches = self.accelerator.prepare_data_loader(options.batches) if several else options.batches
        self.teacher = None if options.teacher is None else options.teacher.to(self.device).eval()
        self.total = recipe.epochs * len(self.batches)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.total)
        self.step = 0
        self.generators = Generators(self.device, options.batches)
        self.epoch_random = self.generators.state()

    def _set_levels(self) -> None:
        """Fits levels that are not set yet; all workers then get the first one's, with its parameters."""
        if not isinstance(self.options.batches, DataLoader):
            raise TrainingError("several processes share out the batches of a DataLoader, which batches is not")
        from accelerate.utils import send_to_device

        inputs, _ = split_batch(send_to_device(next(iter(self.options.batches)), self.device))
        args, kwargs = split_inputs(inputs)
        with evaluating(self.gm):
            self.gm(*args, **kwargs)

    @property
    def _file(self) -> Path | None:
        return None if self.options.folder is None else Path(self.options.folder) / "checkpoint.pt"

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that takes it up."""
        quantizers = {name: each for name, each in self.gm.named_modules() if isinstance(each, Quantizer)}
        return {
            "recipe": self.options.recipe.to_dict(),
            "steps": self.total,
            "processes": self.accelerator.num_processes,
            "lower type": str(self.lower_type),
            "bits": {name: quantizer.bits for name, quantizer in quantizers.items()},
            "generators of the loader": len(self.generators.of_loader),
        }

    def train(self) -> None:
        """Runs the steps that are left."""
        main = self.accelerator.is_main_process
        columns = (
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        console = Console(stderr=True)
        writer = _writer(self.options.folder, self.step) if main else None
        with Progress(*columns, console=console, disable=not (main and console.is_terminal)) as progress:
            task = progress.add_task("", total=self.total, completed=self.step, loss="")
            for inputs, targets in self._batches_left():
                loss = self._train_step(inputs, targets)
                progress.update(task, completed=self.step, loss=f"loss {float(loss):.4g}")
                if writer is not None:
                    self._log(writer)
                if self.step % self.options.checkpoint_every == 0 or self.step == self.total:
                    self.save()
        if writer is not None:
            writer.close()

    def _batches_left(self) -> Iterator[Batch]:
        """The batches from the current step on, on the device; an epoch's earlier ones are drawn and left out."""
        from accelerate.utils import send_to_device

        per_epoch = len(self.batches)
        resumed = self.generators.state() if self.step % per_epoch else None
        while self.step < self.total:
            done = self.step % per_epoch
            if not done:
                self.epoch_random = self.generators.state()
            else:
                self.generators.restore(self.epoch_random)
            batches = iter(self.batches)
            for _ in range(done):
                next(batches, None)
            if resumed is not None:
                self.generators.restore(resumed)
                resumed = None
            for index in range(done, per_epoch):
                batch = next(batches, None)
                # A loader that comes to its end draws once more: before the step, so that a checkpoint knows it.
                too_many = index + 1 == per_epoch and next(batches, None) is not None
                if batch is None or too_many:
                    given = f"more than {per_epoch}" if too_many else index
                    raise TrainingError(f"batches has length {per_epoch}, but gave {given} in an epoch")
                yield split_batch(send_to_device(batch, self.device))

    def _train_step(self, inputs: ExampleInputs, targets: Any) -> Tensor:
        loss = self.optimizer.step(self._loss, inputs, targets, self._teach(inputs))
        self.schedule.step()
        self.step += 1
        return loss

    def _autocast(self) -> AbstractContextManager[Any]:
        lower = self.lower_type
        return nullcontext() if lower is None else torch.autocast(self.device.type, lower)

    def _teach(self, inputs: ExampleInputs) -> Tensor | None:
        """The teacher's outputs, once for both passes."""
        if self.teacher is None:
            return None
        args, kwargs = split_inputs(inputs)
        with torch.no_grad(), self._autocast():
            return cast("Tensor", self.teacher(*args, **kwargs))

    def _loss(self, inputs: ExampleInputs, targets: Any, taught: Tensor | None) -> Tensor:
        args, kwargs = split_inputs(inputs)
        recipe = self.options.recipe
        with self._autocast():
            outputs = self.forward(*args, **kwargs)
            loss = self.options.loss_fn(outputs, targets)
            if taught is None:
                return loss
            divergence = distillation_loss(outputs, taught, recipe.temperature)
            return (1 - recipe.distillation) * loss + recipe.distillation * divergence

    def _log(self, writer: Any) -> None:
        seen = self.optimizer.last_step
        if seen is None:
            return
        scalars = {
            "loss/vanilla": seen.loss,
            "loss/perturbed": seen.perturbed_loss,
            "gradient/norm": seen.gradient_norm,
            "gradient/perturbed_norm": seen.perturbed_gradient_norm,
            "gradient/cosine": seen.cosine,
            "saq/moved_share": seen.moved_share,
            "saq/rho": self.optimizer.rho,
            "saq/skipped_steps": self.optimizer.skipped_steps,
            "saq/lr": self.optimizer.param_groups[0]["lr"],
        }
        if self.step % len(self.batches) == 0:
            quantizers = ((name, each) for name, each in self.gm.named_modules() if isinstance(each, Quantizer))
            scalars |= {f"clipping_level/{name}": each.level.detach().mean() for name, each in quantizers}
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        if self._file is None:
            return
        from accelerate.utils import gather_object

        random_states = gather_object([(self.epoch_random, self.generators.state())])
        if not self.accelerator.is_main_process:
            return
        state = {
            "identity": self._identity(),
            "step": self.step,
            "model": self.gm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": random_states,
        }
        file = io.BytesIO()
        torch.save(state, file)
        write_whole(self._file, file.getvalue())

    def resume(self) -> None:
        """Takes up the folder's checkpoint, if there is one."""
        if self._file is None or not self._file.exists():
            return
        try:
            state = torch.load(self._file, map_location="cpu", weights_only=True)
            if not (isinstance(state, dict) and state.keys() >= _PARTS):
                raise ValueError("it holds something else")
        except (RuntimeError, EOFError, LookupError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self._file} is not a checkpoint of TrainSaq: {error}") from error
        other = differences(state["identity"], self._identity())
        if other:
            raise CheckpointError(f"{self._file} is of a run with other {', '.join(other)}: use another folder")
        try:
            self.gm.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{self._file} is of another model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.epoch_random, current = state["random"][self.accelerator.process_index]
        if self.step >= len(self.batches) and getattr(self.batches, "persistent_workers", False):
            next(iter(self.batches))  # workers that persist take a seed in the first epoch only
        self.generators.restore(current)


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("training needs accelerate: pip install 'saq_fx[train]'") from error
    # On CPUs it would otherwise leave the processes of torchrun to train alone.
    return Accelerator(cpu=not torch.accelerator.is_available())


def _base_optimizer(recipe: TrainingRecipe, gm: nn.Module) -> torch.optim.Optimizer:
    made = getattr(torch.optim, recipe.optimizer, None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise TrainingError(f"torch.optim has no optimizer {recipe.optimizer!r}")
    optimizer: Callable[..., torch.optim.Optimizer] = made
    try:
        return optimizer(parameter_groups(gm, recipe.weight_decay), lr=recipe.lr, **recipe.optimizer_options)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"optimizer_options do not suit {recipe.optimizer}: {error}") from error


def _writer(folder: str | os.PathLike[str] | None, step: int) -> Any:
    """Of TensorBoard's scalars, after those of the steps done; None without a folder."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("logs need tensorboard: pip install 'saq_fx[train]'") from error
    return SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
