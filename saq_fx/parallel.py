"""What data-parallel workers must agree on in a sharpness-aware step: gradients, norms, whether a step is skipped."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from saq_fx.errors import TrainingError
from saq_fx.sharpness import global_norm


@dataclass(frozen=True)
class Workers:
    """The processes that train a module together: one, those of `DistributedDataParallel`, or those of `fully_shard`.

    Under DDP a worker's own gradient is at hand, and each perturbs by its own (m-sharpness, SAQ Sec. 5). Under FSDP2
    gradients exist only as averages, in shards, and all workers perturb by the average.
    """

    group: Any = None
    replicated: DistributedDataParallel | None = None

    @staticmethod
    def of(module: nn.Module) -> "Workers":
        """The workers of a module, as it is wrapped.

        Raises:
            TrainingError: it is wrapped by FSDP1, or sharded over a mesh of several dimensions.
        """
        for part in module.modules():
            if isinstance(part, DistributedDataParallel):
                return Workers(part.process_group, part)
            if isinstance(part, FullyShardedDataParallel):
                raise TrainingError("SAQ works with FSDP2 only: use torch.distributed.fsdp.fully_shard(gm)")
            if isinstance(part, FSDPModule):
                mesh = next(p.device_mesh for p in part.parameters() if isinstance(p, DTensor))
                if mesh.ndim > 1:
                    raise TrainingError(f"SAQ takes a module sharded over one dimension, not over the mesh {mesh}")
                return Workers(mesh.get_group())
        return Workers()

    @property
    def several(self) -> bool:
        """Whether there is anything to agree on."""
        return self.group is not None

    @property
    def sharded(self) -> bool:
        """Whether parameters and gradients are shards, and gradients averages."""
        return self.several and self.replicated is None

    @property
    def has_static_graph(self) -> bool:
        """Whether DDP was told that every step has the same graph."""
        return self.replicated is not None and bool(self.replicated.static_graph)

    @property
    def finds_unused(self) -> bool:
        """Whether DDP looks for parameters that a pass does not use."""
        return self.replicated is not None and self.replicated.find_unused_parameters

    def check_step(self) -> None:
        """Raises TrainingError where DDP is told to let the workers part: inside `join()` and `no_sync()`."""
        if self.replicated is None:
            return
        if not self.replicated.require_backward_grad_sync:
            raise TrainingError("SAQ's step cannot run inside no_sync(): to accumulate gradients, use chunk_size")
        if self.replicated._join_config.enable:
            raise TrainingError(
                "SAQ's step cannot run inside join(), which does not know of what its workers tell each other: give "
                "all workers the same number of batches (DistributedSampler does)"
            )

    def unsynchronized(self, is_last: bool = False) -> AbstractContextManager[None]:
        """Inside, a backward pass leaves every worker its own gradient, where that is possible.

        Not in the last pass of a step where DDP looks for unused parameters: it takes those of all passes since the
        last synchronised one for used, and fails on those of them that the next one does not use.
        """
        if self.replicated is None or (is_last and self.finds_unused):
            return nullcontext()
        return self.replicated.no_sync()

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, of equal shapes on all workers, by their means over the workers."""
        if not self.several:
            return
        for group in _by_kind(tensors):
            flat = torch.cat([tensor.flatten() for tensor in group])
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            parts = torch.split(flat, [tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [part.view_as(each) for part, each in zip(parts, group, strict=True)])

    @torch.no_grad()
    def average_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replaces the workers' own gradients by their means; sharded ones are means already."""
        if not self.sharded:
            self.average(gradients)

    @torch.no_grad()
    def sum_of_shards(self, values: Tensor) -> Tensor:
        """Of sums over the parameters at hand, the sums over all: shards are added up."""
        if self.sharded:
            dist.all_reduce(values, group=self.group)
        return values

    def norm(self, gradients: Collection[Tensor]) -> float:
        """The global norm of gradients of parameters, of which this worker may hold shards."""
        return float(self.sum_of_shards(global_norm(gradients) ** 2) ** 0.5)

    def all_agree(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds on every worker: whether one goes on must not depend on which it is."""
        if not self.several:
            return holds
        flag = torch.tensor(int(holds), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def any_of(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each of a list, whether it holds on any worker."""
        if not self.several:
            return list(flags)
        reduced = torch.tensor(flags, dtype=torch.uint8, device=device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in reduced.tolist()]


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this worker holds, in the same memory; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that can be concatenated: of one type, on one device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
