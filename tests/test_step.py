"""What a step of SAQ refuses, and what it leaves as it was besides parameters."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from saq_fx.errors import TrainingError
from saq_fx.prepare import prepare_saq
from saq_fx.sharpness import global_norm, inner_product
from saq_fx.training import SAQ

X, Y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Stateful(nn.Module):
    """Counts its calls and keeps what it saw, in attributes; draws from the generators of Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.calls, self.mean, self.seen = 0, torch.zeros(4), list[float]()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h: Tensor = self.a(x) if random.random() < 0.5 else x
        self.mean += h.detach().mean(0)
        self.seen.append(float(h.detach().sum()))
        self.last = h.detach()
        return self.b(h * float(np.random.rand()))  # type: ignore[no-any-return]


def sgd(net: nn.Module, **options: Any) -> SAQ:
    return SAQ(net, torch.optim.SGD(net.parameters(), 0.1), **options)


@pytest.mark.parametrize("make", [Stateful, lambda: prepare_saq(Stateful(), example_inputs=X)])
def test_the_second_pass_leaves_attributes_and_draws_the_same_numbers(make: Callable[[], Any]) -> None:
    random.seed(0)
    net = make().train()
    opt = sgd(net, rho=0.0, period=1)
    for step in range(1, 9):
        before, mean = net.calls, net.mean.clone()
        opt.step(lambda: F.cross_entropy(net(X), Y))
        assert opt.last_step is not None
        assert opt.last_step.loss == opt.last_step.perturbed_loss
        assert net.calls == before + 1
        assert len(net.seen) == step
        torch.testing.assert_close(net.mean, mean + net.last.mean(0))


@pytest.mark.filterwarnings("ignore:SAQ skipped")
def test_a_skipped_step_leaves_attributes_and_levels_that_are_not_set() -> None:
    net, unset = Stateful(), prepare_saq(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))).train()
    for module in (net, unset):
        sgd(module, period=1).step(lambda m=module: math.inf * F.cross_entropy(m(X), Y))  # type: ignore[misc]
    quantizer: Any = unset.get_submodule("0.weight_quantizer")
    assert (net.calls, net.seen, net.last, quantizer.initialized) == (0, [], None, False)
    sgd(unset).step(lambda: F.cross_entropy(unset(X), Y))
    assert quantizer.initialized
    assert quantizer.smallest_level > 0


def test_norms_and_products_of_half_precision_are_in_single_precision() -> None:
    large = [torch.full((100,), 1000.0, dtype=torch.float16)] * 2
    assert float(inner_product(large, large)) == pytest.approx(2e8)
    assert float(global_norm(large)) == pytest.approx(math.sqrt(2e8))
    fine = torch.linspace(0.1, 1, 1000).bfloat16()
    assert float(inner_product([fine], [fine])) == pytest.approx(float(fine.double() @ fine.double()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_may_change_its_type_between_steps(dtype: torch.dtype) -> None:
    net: Any = nn.Linear(4, 3)
    opt = sgd(net, period=2)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(net(X), Y))
    net.to(dtype)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(net(X.to(dtype)), Y))
    assert opt.skipped_steps == 0
    assert net.weight.dtype == dtype


def test_closures_that_do_what_saq_does_are_refused() -> None:
    net = nn.Linear(4, 3)
    opt = sgd(net)

    def usual() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with pytest.raises(TrainingError, match="must neither zero gradients nor call backward"):
        opt.step(usual)
    with pytest.raises(TrainingError, match="takes a closure that computes the loss"):
        opt.step()
    scaler = GradScaler("cpu")
    scaler.scale(F.cross_entropy(net(X), Y)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=r"SAQ\(\.\.\., grad_scaler=scaler\)"):
        scaler.step(opt)


def test_sparse_gradients_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(TrainingError, match=r"gradient of 0\.weight is sparse: .* sparse=False"):
        sgd(net, period=1).step(lambda: net(torch.zeros(2, 2, dtype=torch.long)).sum())


def test_base_optimizers_that_cannot_be_are_refused() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(TrainingError, match="LBFGS computes the loss itself"):
        SAQ(net, torch.optim.LBFGS(net.parameters()))
    with pytest.raises(TrainingError, match="base optimizer is a SAQ already"):
        SAQ(net, sgd(net))
    with pytest.raises(TrainingError, match="not generator"):
        SAQ(net, net.parameters())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="takes the module that the closure runs, not NoneType"):
        SAQ(None, torch.optim.SGD(net.parameters(), 0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rho", "beta", "second_pass_fraction", "max_gradient_norm", "grad_scaler"])
def test_options_of_another_type_are_named(name: str) -> None:
    with pytest.raises(TrainingError, match=name):
        sgd(nn.Linear(4, 3), **{name: "0.5"})
