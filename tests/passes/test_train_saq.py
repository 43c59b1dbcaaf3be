"""The training pass: the same steps as by hand, and the same end however often it was stopped."""

import copy
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from saq_fx.data import digits
from saq_fx.distillation import distillation_loss
from saq_fx.errors import CheckpointError, PassError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.networks import SmallResNet
from saq_fx.parameters import parameter_groups
from saq_fx.passes.insert_perturbations import InsertPerturbations
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.prepare import prepare_saq
from saq_fx.training import SAQ
from saq_fx.training_recipe import PAPER_RECIPES, TrainingRecipe, paper_recipe

RECIPE = TrainingRecipe(epochs=3, rho=0.2, period=2)


def network() -> nn.Module:
    """With dropout, so that the random state matters."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), Head())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def images(count: int = 40) -> TensorDataset:
    training, _ = digits(count)
    return TensorDataset(training.x, training.y)


def loader(own_generator: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    return DataLoader(images(), batch_size=8, shuffle=True, generator=generator)


def prepared() -> SaqGraphModule:
    torch.manual_seed(1)
    return prepare_saq(network(), example_inputs=digits(20)[0].x, precision="W3A3")


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_it_takes_the_steps_of_a_loop_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    gm = prepared()
    by_hand = copy.deepcopy(gm).train()
    torch.manual_seed(5)
    base = torch.optim.SGD(parameter_groups(by_hand, 1e-4), 0.02, momentum=0.9)
    opt = SAQ(by_hand, base, 0.2, period=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 15)
    batches = loader()
    for _ in range(3):
        for x, y in batches:
            opt.step(lambda x=x, y=y: F.cross_entropy(by_hand(x), y))  # type: ignore[misc]
            schedule.step()
    torch.manual_seed(5)
    result = TrainSaq(loader(), recipe=RECIPE).run(gm)
    assert not result.modified
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(parameter, gm.get_parameter(name)), name
    assert "BitOps" in capsys.readouterr().out


class Stopped(Exception):
    pass


class StopsAt:
    """A loss that fails at a call, as an interruption would."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize(("every", "stops"), [(1, [2, 9]), (4, [13]), (5, [12, 8]), (7, [1])])
def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, every: int, stops: list[int], own_generator: bool
) -> None:
    torch.manual_seed(5)
    expected = prepared()
    TrainSaq(loader(own_generator), recipe=RECIPE).run(expected)
    gm = prepared()
    for call in stops:
        with pytest.raises(Stopped):
            TrainSaq(loader(own_generator), StopsAt(call), RECIPE, folder=tmp_path, checkpoint_every=every).run(gm)
        gm = prepared()
    TrainSaq(loader(own_generator), recipe=RECIPE, folder=tmp_path, checkpoint_every=every).run(gm)
    assert_equal_states(gm, expected)
    again = prepared()
    TrainSaq(loader(own_generator), StopsAt(0), RECIPE, folder=tmp_path).run(again)
    assert_equal_states(again, expected)


def by_batches() -> DataLoader[Any]:
    data = images()
    order = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_sampler=BatchSampler(order, 8, drop_last=True))


def test_a_batch_sampler_s_generator_is_resumed_too(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = prepared()
    TrainSaq(by_batches(), recipe=RECIPE).run(expected)
    with pytest.raises(Stopped):
        TrainSaq(by_batches(), StopsAt(12), RECIPE, folder=tmp_path, checkpoint_every=3).run(prepared())
    gm = prepared()
    TrainSaq(by_batches(), recipe=RECIPE, folder=tmp_path).run(gm)
    assert_equal_states(gm, expected)


class Augmented(Dataset[Any]):
    """Images moved by random numbers of Python and of numpy."""

    def __init__(self) -> None:
        self.x, self.y = images().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + random.random() + float(np.random.rand()), self.y[index]


def augmented() -> DataLoader[Any]:
    return DataLoader(Augmented(), 8, shuffle=True)


def by_persistent_workers() -> DataLoader[Any]:
    return DataLoader(images(), 8, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("every", [5, 7])
@pytest.mark.parametrize("make", [augmented, by_persistent_workers])
def test_random_numbers_of_the_loader_are_resumed(tmp_path: Path, make: Any, every: int) -> None:
    """The order of persistent workers follows one seed less per epoch, but for the first."""

    def seeded() -> SaqGraphModule:
        random.seed(0)
        np.random.seed(0)
        gm = prepared()
        torch.manual_seed(5)
        return gm

    expected = seeded()
    TrainSaq(make(), recipe=RECIPE).run(expected)
    with pytest.raises(Stopped):
        TrainSaq(make(), StopsAt(16), RECIPE, folder=tmp_path, checkpoint_every=every).run(seeded())
    random.seed(9)
    np.random.seed(9)
    gm = prepared()
    TrainSaq(make(), recipe=RECIPE, folder=tmp_path).run(gm)
    assert_equal_states(gm, expected)


def test_modules_in_evaluation_mode_stay_so_in_a_graph_in_training_mode() -> None:
    for whole in (True, False):
        gm: Any = prepared().train(whole)
        norm = gm.get_submodule("1").eval()
        before = norm.running_mean.clone()
        TrainSaq(loader(), recipe=replace(RECIPE, epochs=1)).run(gm)
        assert torch.equal(norm.running_mean, before) == whole
        assert norm.training != whole


SCRIPT = """
import sys, time, torch
from pathlib import Path
from tests.passes.test_train_saq import RECIPE, loader, prepared
from saq_fx.passes.train_saq import TrainSaq
from torch.nn import functional as F
gm = prepared()
slow = float(sys.argv[2])
def loss(outputs, targets):
    time.sleep(slow)
    print("step", flush=True)
    return F.cross_entropy(outputs, targets)
TrainSaq(loader(), loss, RECIPE, folder=Path(sys.argv[1]), checkpoint_every=1).run(gm)
torch.save(gm.state_dict(), Path(sys.argv[1]) / "end.pt")
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    for steps in (3, 9):
        with subprocess.Popen([*command, "0.05"], cwd=root, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(steps):
                assert process.stdout.readline() == b"step\n"
            process.send_signal(signal.SIGKILL)
    subprocess.run([*command, "0"], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    expected = prepared()
    TrainSaq(loader(), recipe=RECIPE).run(expected)
    ended, state = torch.load(tmp_path / "end.pt"), expected.state_dict()
    assert all(torch.equal(ended[name], value) for name, value in state.items())


def test_scalars_are_logged_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gm = prepared()
    with pytest.raises(Stopped):
        TrainSaq(loader(), StopsAt(10), RECIPE, folder=tmp_path, checkpoint_every=5).run(gm)
    TrainSaq(loader(), recipe=RECIPE, folder=tmp_path).run(prepared())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss/vanilla", "loss/perturbed", "gradient/cosine", "gradient/norm", "saq/rho", "saq/lr"} <= scalars
    assert "clipping_level/0.weight_quantizer" in scalars
    assert [event.step for event in events.Scalars("loss/vanilla")] == list(range(1, 16))
    assert [event.step for event in events.Scalars("loss/perturbed")] == list(range(2, 16, 2))
    assert [event.step for event in events.Scalars("clipping_level/0.weight_quantizer")] == [5, 10, 15]


def test_a_teacher_is_distilled_and_batchnorm_reestimated() -> None:
    torch.manual_seed(2)
    teacher = network().train()
    recipe = replace(RECIPE, epochs=1, distillation=0.25, temperature=3.0, reestimation_batches=2)
    batches = [(x, y) for x, y in loader()]
    gm = prepared()
    by_hand = copy.deepcopy(gm).train()
    torch.manual_seed(5)
    TrainSaq(batches, recipe=recipe, teacher=teacher).run(gm)
    torch.manual_seed(5)
    opt = SAQ(by_hand, torch.optim.SGD(parameter_groups(by_hand, 1e-4), 0.02, momentum=0.9), 0.2, period=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(batches))
    for x, y in batches:
        taught = teacher.eval()(x).detach()

        def loss(x: Tensor = x, y: Tensor = y, taught: Tensor = taught) -> Tensor:
            outputs = by_hand(x)
            p, q = (taught / 3).softmax(-1), (outputs / 3).log_softmax(-1)
            divergence = 9 * (p * (p.log() - q)).sum(-1).mean()
            return 0.75 * F.cross_entropy(outputs, y) + 0.25 * divergence

        opt.step(loss)
        schedule.step()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name), parameter, rtol=1e-5, atol=1e-6, msg=name)
    assert int(gm.get_buffer("1.num_batches_tracked")) == 2


def test_distillation_is_zero_for_equal_outputs_and_scales_with_temperature() -> None:
    a, b = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert float(distillation_loss(a, a, 2.0)) == pytest.approx(0.0, abs=1e-15)
    p, q = (a / 2).softmax(-1), (b / 2).softmax(-1)
    images, others = a.movedim(-1, 1), b.movedim(-1, 1)
    assert float(distillation_loss(others, images, 2.0)) == pytest.approx(float(4 * (p * (p / q).log()).sum() / 24))


def test_graphs_with_leaves_are_left_without() -> None:
    gm = prepared()
    InsertPerturbations(case=2).run(gm)
    gm.recompile()
    TrainSaq(loader(), recipe=replace(RECIPE, epochs=1)).run(gm)
    assert not [name for name, _ in gm.named_modules() if "delta" in name]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_any_optimizer_of_torch_trains_it(name: str) -> None:
    gm = prepared()
    before = copy.deepcopy(gm)
    TrainSaq(loader(), recipe=TrainingRecipe(1, 1e-3, optimizer=name, optimizer_options={})).run(gm)
    assert not torch.equal(gm.get_parameter("0.weight"), before.get_parameter("0.weight"))


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_lower_types_train_it_and_resume(tmp_path: Path, mixed_precision: str) -> None:
    start, gm = float_loss(prepared()), prepared()
    with pytest.raises(Stopped):
        TrainSaq(loader(), StopsAt(9), RECIPE, None, tmp_path, 2, mixed_precision).run(gm)
    resumed = prepared()
    TrainSaq(loader(), F.cross_entropy, RECIPE, None, tmp_path, 2, mixed_precision).run(resumed)
    straight = prepared()
    TrainSaq(loader(), F.cross_entropy, RECIPE, mixed_precision=mixed_precision).run(straight)
    assert_equal_states(resumed, straight)
    assert all(parameter.dtype == torch.float32 for parameter in resumed.parameters())
    assert float_loss(resumed) < start


def float_loss(gm: SaqGraphModule) -> float:
    x, y = images().tensors
    with torch.no_grad():
        return float(F.cross_entropy(gm.train()(x), y))


class Unsized:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Short:
    """Gives fewer batches than it says."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter(list(loader())[:2])


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="batches must have a length"):
        TrainSaq(Unsized())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="batches must have a length"):
        TrainSaq(DataLoader(Endless()))
    with pytest.raises(TrainingError, match="batches is empty"):
        TrainSaq([])
    with pytest.raises(TrainingError, match=r"optimizer_options do not suit SGD.*speed"):
        TrainSaq(loader(), recipe=TrainingRecipe(optimizer_options={"speed": 1})).run(prepared())
    with pytest.raises(PassError, match="lacks 'quantizers'"):
        TrainSaq(loader()).run(prepare_saq(network(), example_inputs=digits(20)[0].x, precision=None))
    with pytest.raises(TrainingError, match="distillation takes both"):
        TrainSaq(loader(), teacher=network())
    with pytest.raises(TrainingError, match="mixed_precision is one of no, bf16, fp16, not 'int8'"):
        TrainSaq(loader(), mixed_precision="int8")
    with pytest.raises(TrainingError, match="checkpoint_every must be"):
        TrainSaq(loader(), checkpoint_every=0)
    with pytest.raises(TrainingError, match="no optimizer 'Sgd'"):
        TrainSaq(loader(), recipe=TrainingRecipe(optimizer="Sgd")).run(prepared())
    with pytest.raises(TrainingError, match="batches has length 3, but gave 2"):
        TrainSaq(Short(), recipe=RECIPE).run(prepared())
    with pytest.raises(PassError, match=r"this is a Sequential, no prepared model: call saq_fx\.prepare_saq"):
        TrainSaq(loader()).run(network())  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"do not suit LBFGS: .*parameter groups"):
        TrainSaq(loader(), recipe=TrainingRecipe(optimizer="LBFGS", optimizer_options={})).run(prepared())
    for batch, found in (({"x": 1}, "not dict"), ((1, 2, 3), "not 3 of them"), (torch.ones(2), "not Tensor")):
        with pytest.raises(TrainingError, match=rf"pairs \(inputs, targets\), {found}"):
            TrainSaq([batch], recipe=RECIPE).run(prepared())
    distilled = replace(RECIPE, distillation=0.5)
    with pytest.raises(TrainingError, match=r"the graph gives \(8, 10\), the teacher \(8, 4, 6, 6\)"):
        TrainSaq(loader(), recipe=distilled, teacher=nn.Conv2d(1, 4, 3)).run(prepared())
    TrainSaq(loader(), recipe=RECIPE, folder=tmp_path).run(prepared())
    with pytest.raises(CheckpointError, match=r"other generators of the loader \(1, here 0\): use another folder"):
        TrainSaq(loader(own_generator=False), recipe=RECIPE, folder=tmp_path).run(prepared())
    with pytest.raises(
        CheckpointError, match=r"is of a run with other recipe \(lr \(0.02, here 0.5\)\): use another folder"
    ):
        TrainSaq(loader(), recipe=replace(RECIPE, lr=0.5), folder=tmp_path).run(prepared())
    other = prepare_saq(SmallResNet(), example_inputs=digits(20)[0].x)
    with pytest.raises(CheckpointError, match="is of a run with other bits"):
        TrainSaq(loader(), recipe=RECIPE, folder=tmp_path).run(other)
    with pytest.raises(CheckpointError, match="is of a run with other lower type"):
        TrainSaq(loader(), recipe=RECIPE, folder=tmp_path, mixed_precision="bf16").run(prepared())
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    torch.save({"identity": {}}, tmp_path / "other.pt")
    for content in (b"", b"nonsense", whole[:1000], whole[: len(whole) // 2], (tmp_path / "other.pt").read_bytes()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a checkpoint of TrainSaq"):
            TrainSaq(loader(), recipe=RECIPE, folder=str(tmp_path)).run(prepared())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"distillation": 1.5}, "distillation is a weight between 0 and 1"),
        ({"weight_decay": -1.0}, "cannot be negative"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, not nan"),
        ({"lr": "0.1"}, "lr must be a finite number, not '0.1'"),
        ({"reestimation_batches": 1.5}, "reestimation_batches must be a whole number, not 1.5"),
        ({"optimizer": torch.optim.SGD}, "optimizer is the name of a class"),
        ({"optimizer_options": None}, "optimizer_options are a dictionary, not None"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingRecipe(**options)


def test_the_papers_settings() -> None:
    """Table A and Section 5 of the paper."""
    radii = {key: recipe.rho for key, recipe in PAPER_RECIPES.items() if not key[0].startswith("vit")}
    assert radii == {
        ("resnet18", 2): 0.30, ("resnet18", 4): 0.65, ("resnet34", 2): 0.65, ("resnet34", 4): 0.90,
        ("resnet50", 2): 0.65, ("resnet50", 4): 0.95, ("mobilenet_v2", 4): 0.40,
    }  # fmt: skip
    small = paper_recipe("resnet18", 2)
    assert (small.epochs, small.lr, small.weight_decay, small.optimizer) == (90, 0.02, 2.5e-5, "SGD")
    assert (small.chunk_size, small.period, small.beta, small.case) == (128, 4, 0.7, 3)
    mobile = paper_recipe("mobilenet_v2", 4)
    assert (mobile.epochs, mobile.weight_decay, mobile.reestimation_batches) == (140, 4e-5, 10)
    vit = paper_recipe("vit_b_16", 4)
    assert (vit.optimizer, vit.lr, vit.epochs, vit.rho) == ("AdamW", 2e-4, 150, 0.01)
    with pytest.raises(TrainingError, match="no settings for 'vgg16' at 4 bits; it has resnet18 at 2"):
        paper_recipe("vgg16", 4)


PARALLEL_SCRIPT = """
import sys, torch
from pathlib import Path
from tests.passes.test_train_saq import RECIPE, in_order, without_dropout
from saq_fx.passes.train_saq import TrainSaq
torch.set_num_threads(1)
gm = without_dropout()
folder = Path(sys.argv[1])
TrainSaq(in_order(), recipe=RECIPE, folder=folder, checkpoint_every=2).run(gm)
rank = torch.distributed.get_rank()
torch.save(gm.state_dict(), folder / f"end{rank}.pt")
torch.distributed.destroy_process_group()
"""


def in_order() -> DataLoader[Any]:
    return DataLoader(images(48), batch_size=8)


def without_dropout() -> SaqGraphModule:
    torch.manual_seed(1)
    model = network()
    model[3] = nn.Identity()  # type: ignore[operator]
    return prepare_saq(model, example_inputs=digits(20)[0].x, precision="W3A3")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_on_their_batches_together(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = tmp_path / "train.py"
    script.write_text(PARALLEL_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not counted: none") == 1, "the table is printed once"
    first, second = (torch.load(tmp_path / f"end{rank}.pt") for rank in (0, 1))

    alone = without_dropout()
    alone.train()
    opt = SAQ(alone, torch.optim.SGD(parameter_groups(alone, 1e-4), 0.02, momentum=0.9), 0.2, period=2, chunk_size=8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
    batches = list(in_order())
    for _ in range(3):
        for (x, y), (other_x, other_y) in zip(batches[::2], batches[1::2], strict=True):
            both = torch.cat([x, other_x]), torch.cat([y, other_y])
            opt.step(lambda x, y: F.cross_entropy(alone(x), y), *both)
            schedule.step()
    for name, parameter in alone.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.data, rtol=1e-4, atol=1e-6, msg=name)
