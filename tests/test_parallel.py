"""Two processes against one: data-parallel steps, replicated (DDP) and sharded (FSDP2)."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from saq_fx.errors import TrainingError
from saq_fx.parallel import Workers
from saq_fx.precision import Policy
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.training import SAQ
from tests.test_training import RHO, Reference, assert_same, batch, loss_of, prepared

STEPS, WORKERS = 5, 2
RATE = 0.1
Batch = tuple[Tensor, Tensor]


class Unsigned(nn.Module):
    """No activation is negative: the step of a signed one has a gradient scaled by the size of the worker's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).relu()).relu().mean((2, 3)))


def run_replicated(gm: nn.Module, data: list[Batch], options: dict[str, Any]) -> dict[str, Any]:
    wrapped = DistributedDataParallel(gm)
    opt = SAQ(wrapped, torch.optim.SGD(wrapped.parameters(), 1.0), RHO, **options)
    losses = [float(opt.step(lambda x=x, y=y: loss_of(wrapped(x), y))) for x, y in data]  # type: ignore[misc]
    return {"parameters": dict(gm.named_parameters()), "losses": losses, "last": opt.last_step}


def run_with_overflow(gm: nn.Module, data: list[Batch], options: dict[str, Any]) -> dict[str, Any]:
    """Only the first worker's loss of the second step is infinite."""
    wrapped = DistributedDataParallel(gm)
    opt = SAQ(wrapped, torch.optim.SGD(wrapped.parameters(), 1.0), RHO, **options)
    for index, (x, y) in enumerate(data):
        bad = index == 1 and dist.get_rank() == 0
        opt.step(lambda x=x, y=y, bad=bad: (math.inf if bad else 1.0) * loss_of(wrapped(x), y))  # type: ignore[misc]
    return {"parameters": dict(gm.named_parameters()), "skipped": opt.skipped_steps}


def run_sharded(gm: nn.Module, data: list[Batch], options: dict[str, Any]) -> dict[str, Any]:
    fully_shard(gm, mesh=init_device_mesh("cpu", (WORKERS,)))
    assert all(isinstance(p, DTensor) for p in gm.parameters())
    opt = SAQ(gm, torch.optim.SGD(gm.parameters(), RATE, momentum=0.9), RHO, **options)
    losses = []
    for x, y in data:
        losses.append(float(opt.step(lambda x=x, y=y: loss_of(gm(x), y))))  # type: ignore[misc]
        opt.load_state_dict(opt.state_dict())
    parameters = {name: p.full_tensor() for name, p in gm.named_parameters()}  # type: ignore[attr-defined]
    return {"parameters": parameters, "losses": losses, "last": opt.last_step}


def worker(rank: int, run: Callable[..., dict[str, Any]], jobs: list[tuple[Any, ...]], folder: Path) -> None:
    """One process: its half of every batch; the first one's results are kept."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    results = []
    for gm, data, options in jobs:
        half = len(data[0][0]) // WORKERS
        own = [(x[rank * half :][:half], y[rank * half :][:half]) for x, y in data]
        results.append(run(copy.deepcopy(gm), own, options))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def in_two_processes(run: Callable[..., dict[str, Any]], jobs: list[tuple[Any, ...]], folder: Path) -> Any:
    torch.multiprocessing.spawn(worker, (run, jobs, folder), nprocs=WORKERS)  # type: ignore[attr-defined]
    return torch.load(folder / "results.pt", weights_only=False)


def test_replicated_workers_perturb_by_their_own_gradients(tmp_path: Path) -> None:
    gm, data = prepared(), [batch() for _ in range(STEPS)]
    settings: list[dict[str, Any]] = [
        {"case": case, "period": period, "losses": losses}
        for case, period, losses in [(1, 1, "both"), (2, 1, "both"), (3, 1, "perturbed"), (3, 2, "both")]
    ]
    results = in_two_processes(run_replicated, [(gm, data, options) for options in settings], tmp_path)
    for options, result in zip(settings, results, strict=True):
        reference = Reference(gm, **options)
        for (x, y), loss in zip(data, result["losses"], strict=True):
            halves = [(x[:3], y[:3]), (x[3:], y[3:])]
            assert loss == pytest.approx(sum(float(reference.loss(half).detach()) for half in halves) / 2, rel=1e-9)
            reference.step((x, y), chunk=3)
        one = nn.Module()
        for name, value in result["parameters"].items():
            one.register_parameter(name.replace(".", "/"), value)
        assert_same(one, {name.replace(".", "/"): value for name, value in reference.values.items()})


@pytest.mark.slow
def test_a_worker_that_overflows_makes_all_skip(tmp_path: Path) -> None:
    gm, data = prepared(), [batch() for _ in range(3)]
    options = [{"period": period} for period in (1, 2)]
    for result in in_two_processes(run_with_overflow, [(gm, data, each) for each in options], tmp_path):
        assert result["skipped"] == 1
        assert all(bool(p.isfinite().all()) for p in result["parameters"].values())


@pytest.mark.slow
def test_sharded_workers_perturb_by_the_average_gradient(tmp_path: Path) -> None:
    data = [batch() for _ in range(STEPS)]
    gm = prepare_saq(Unsigned().double(), example_inputs=data[0][0], precision="W3A3")
    settings: list[dict[str, Any]] = [
        {"case": 3, "period": 1},
        {"case": 2, "period": 1, "losses": "perturbed"},
        {"case": 1, "period": 2, "max_gradient_norm": 0.1},
    ]
    results = in_two_processes(run_sharded, [(gm, data, options) for options in settings], tmp_path)
    for options, result in zip(settings, results, strict=True):
        alone = copy.deepcopy(gm)
        opt = SAQ(alone, torch.optim.SGD(alone.parameters(), RATE, momentum=0.9), RHO, **options)
        for (x, y), loss in zip(data, result["losses"], strict=True):
            here = opt.step(lambda x, y, gm=alone: loss_of(gm(x), y), x, y)  # type: ignore[misc]
            assert float(here) == pytest.approx(loss, rel=1e-9)
        for name, value in alone.named_parameters():
            torch.testing.assert_close(result["parameters"][name], value.data, rtol=1e-9, atol=1e-11)
        last = result["last"]
        assert opt.last_step is not None
        assert last.gradient_norm == pytest.approx(opt.last_step.gradient_norm, rel=1e-9)
        assert last.cosine == (None if opt.last_step.cosine is None else pytest.approx(opt.last_step.cosine, rel=1e-9))


def test_one_process_agrees_with_itself() -> None:
    workers = Workers.of(nn.Linear(2, 2))
    tensor = torch.ones(3)
    workers.average([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert not workers.several
    assert workers.all_agree(True, tensor.device)
    assert not workers.all_agree(False, tensor.device)


@pytest.fixture
def lone_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("lone_process")
def test_levels_that_workers_would_set_by_themselves_are_refused() -> None:
    gm = prepared()
    apply_policy(gm, Policy({"conv": "W2A4"}))
    wrapped = DistributedDataParallel(gm)
    with pytest.raises(TrainingError, match=r"level of module\.conv\..* is not set.*calibrate\(gm, batches\)"):
        SAQ(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1))


@pytest.mark.usefixtures("lone_process")
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_shared_is_refused() -> None:
    net = nn.Linear(2, 2)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TrainingError, match="adaptive=True needs whole weights"):
        SAQ(net, torch.optim.SGD(net.parameters(), 0.1), adaptive=True)
    net = nn.Linear(2, 2)
    fully_shard(net, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards")))
    with pytest.raises(TrainingError, match="sharded over one dimension"):
        SAQ(net, torch.optim.SGD(net.parameters(), 0.1))


class Branching(nn.Module):
    """Runs one layer or the other, by turns and by the first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor, turn: int) -> Tensor:
        return self.b(x) if (turn + int(x[0, 0] > 0)) % 2 else self.a(x)  # type: ignore[no-any-return]


def run_branches(net: nn.Module, data: list[Batch], options: dict[str, Any]) -> dict[str, Any]:
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    opt = SAQ(wrapped, torch.optim.SGD(wrapped.parameters(), RATE), RHO, **options)
    for step, (x, y) in enumerate(data):
        turn = step + dist.get_rank()
        opt.step(lambda x, y, turn=turn: F.cross_entropy(wrapped(x, turn), y), x, y)  # type: ignore[misc]
    return {"parameters": dict(net.named_parameters())}


def run_unequal_parts(net: nn.Module, data: list[Batch], options: dict[str, Any]) -> dict[str, Any]:
    """The second worker has more samples, and so more chunks."""
    wrapped = DistributedDataParallel(net)
    opt = SAQ(wrapped, torch.optim.SGD(wrapped.parameters(), RATE), RHO, chunk_size=2, **options)
    for x, y in data:
        count = 2 + dist.get_rank()
        opt.step(lambda x, y: F.cross_entropy(wrapped(x), y), x[:count], y[:count])
    with wrapped.no_sync(), pytest.raises(TrainingError, match=r"inside no_sync\(\)"):
        opt.step(lambda: wrapped(x).sum(), x)
    with wrapped.join(), pytest.raises(TrainingError, match=r"inside join\(\).*DistributedSampler"):
        opt.step(lambda: wrapped(x).sum(), x)
    return {"parameters": dict(net.named_parameters())}


def loss_on(net: nn.Module, x: Tensor, y: Tensor, *more: int) -> Tensor:
    return F.cross_entropy(net(x, *more), y)


def two_gradients(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """g and g_s of a float module's loss, zero where it does not reach."""
    g = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    norm = torch.cat([each.flatten() for each in g]).norm()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, each in zip(parameters, g, strict=True):
            p += RHO * each / norm
    g_s = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    with torch.no_grad():
        for p, each in zip(parameters, before, strict=True):
            p.copy_(each)
    return list(g), list(g_s)


@pytest.mark.slow
def test_workers_may_run_different_layers(tmp_path: Path) -> None:
    """From step to step, from worker to worker and from chunk to chunk."""
    data = [(torch.randn(4, 4, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(6)]
    for index, (x, _) in enumerate(data):
        x[:, 0] = torch.tensor([1.0, -1.0 if index % 2 else 1.0, 1.0, -1.0])
    nets = [Branching() for _ in range(4)]
    settings = [{"period": period, "chunk_size": size} for period in (1, 2) for size in (1, 2)]
    jobs = [(net, data, options | {"beta": 0.0}) for net, options in zip(nets, settings, strict=True)]
    results = in_two_processes(run_branches, jobs, tmp_path)
    for net, options, result in zip(nets, settings, results, strict=True):
        parameters, size = list(net.parameters()), options["chunk_size"]
        for step, (x, y) in enumerate(data):
            total = [torch.zeros_like(p) for p in parameters]
            for start in range(0, 4, size):
                part, turn = slice(start, start + size), step + start // 2
                g, g_s = two_gradients(partial(loss_on, net, x[part], y[part], turn), parameters)
                if (step + 1) % options["period"]:
                    g_s = g
                for sums, u, v in zip(total, g, g_s, strict=True):
                    sums += (u + v) * size / 4
            with torch.no_grad():
                for p, each in zip(parameters, total, strict=True):
                    p -= RATE * each
        for name, value in net.named_parameters():
            torch.testing.assert_close(result["parameters"][name], value.data, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_workers_may_have_different_numbers_of_chunks(tmp_path: Path) -> None:
    net = nn.Linear(4, 3, dtype=torch.float64)
    data = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(3)]
    (result,) = in_two_processes(run_unequal_parts, [(net, data, {"period": 1})], tmp_path)
    parameters = list(net.parameters())
    for x, y in data:
        total = [torch.zeros_like(p) for p in parameters]
        for rank, parts in ((0, [(0, 2)]), (1, [(4, 6), (6, 7)])):
            for start, end in parts:
                gradients = two_gradients(partial(loss_on, net, x[start:end], y[start:end]), parameters)
                for sums, u, v in zip(total, *gradients, strict=True):
                    sums += (end - start) / (2 + rank) * (u + v) / 2
        with torch.no_grad():
            for p, each in zip(parameters, total, strict=True):
                p -= RATE * each
    for name, value in net.named_parameters():
        torch.testing.assert_close(result["parameters"][name], value.data, rtol=1e-10, atol=1e-12)
