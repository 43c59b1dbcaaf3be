"""Files: what is saved is what is loaded, and everything else is an error that says why."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import saq_fx
from saq_fx.errors import CheckpointError, PassError
from saq_fx.graph import layers
from saq_fx.inputs import split_inputs
from tests.test_prepare import tensors
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_load_is_the_inverse_of_save(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    recipe = saq_fx.Recipe(scheme="lsq", per_channel=True)
    gm = saq_fx.prepare_saq(model, example_inputs=inputs, precision="W3A4", recipe=recipe).eval()
    saq_fx.save(gm, tmp_path / "model.safetensors")
    other = saq_fx.load(ZOO[name].make(), tmp_path / "model.safetensors", example_inputs=inputs).eval()
    args, kwargs = split_inputs(inputs)
    pairs = zip(tensors(gm(*args, **kwargs)), tensors(other(*args, **kwargs)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert [layer for _, layer in layers(other)] == [layer for _, layer in layers(gm)]
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


def test_a_searched_policy_is_kept(tmp_path: Path) -> None:
    inputs = ZOO["residual"].inputs()
    gm = saq_fx.prepare_saq(ZOO["residual"].make(), example_inputs=inputs)
    saq_fx.apply_policy(gm, saq_fx.Policy({"block*": "W2A6"}))
    saq_fx.save(gm, tmp_path / "m.safetensors")
    loaded = saq_fx.load(ZOO["residual"].make(), tmp_path / "m.safetensors")
    assert saq_fx.policy_of(loaded) == saq_fx.policy_of(gm)
    assert str(saq_fx.policy_of(loaded)["block@1"]) == "W2A6"


def test_wrong_files_are_named(tmp_path: Path) -> None:
    model, inputs = ZOO["residual"].make(), ZOO["residual"].inputs()
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="no file"):
        saq_fx.load(model, path)
    path.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        saq_fx.load(model, path)
    save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="load_state_dict"):
        saq_fx.load(model, path)
    gm = saq_fx.prepare_saq(model, example_inputs=inputs)
    saq_fx.save(gm, path)
    with pytest.raises(CheckpointError, match=r"(?s)another model than Tied.*block"):
        saq_fx.load(ZOO["tied"].make(), path)
    with pytest.raises(PassError, match="precision=None"):
        saq_fx.save(saq_fx.prepare_saq(model, precision=None), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        saq_fx.load(model, path)


@pytest.mark.parametrize(
    "change",
    [{"policy": "{}"}, {"recipe": '{"x": 1}'}, {"recipe": "[1"}, {"aliases": '{"a": "b"}'}, {"version": "x"}],
)
def test_a_damaged_header_is_named(tmp_path: Path, change: dict[str, str]) -> None:
    path = tmp_path / "model.safetensors"
    saq_fx.save(saq_fx.prepare_saq(torch.nn.Linear(2, 2), example_inputs=torch.ones(1, 2)), path)
    with safe_open(path, framework="pt") as file:
        header, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, path, metadata=header | change)
    with pytest.raises(CheckpointError, match=r"header of .*model\.safetensors is damaged|has format version x"):
        saq_fx.load(torch.nn.Linear(2, 2), path)
    with pytest.raises(PassError, match="save: this is a Linear, no prepared model"):
        saq_fx.save(torch.nn.Linear(2, 2), path)  # type: ignore[arg-type]


class Renamed(nn.Module):
    """Loads checkpoints of an older version, saves a number more, and counts; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.layer, self.asks, self.loads = nn.Linear(3, 3), asks, 0
        self.register_load_state_dict_pre_hook(self.rename)
        self.register_load_state_dict_post_hook(self.count)
        self.register_state_dict_post_hook(self.mark)

    @staticmethod
    def rename(module: "Renamed", state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace(f"{prefix}old.", f"{prefix}layer.")] = state.pop(name)
        assert state.pop(f"{prefix}version") == module.layer.in_features

    @staticmethod
    def count(module: "Renamed", missing: Any) -> None:
        module.loads += 1

    @staticmethod
    def mark(module: "Renamed", state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state[f"{prefix}version"] = torch.tensor(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x * 2 if self.asks and x.sum() > 1e9 else x


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(nn.Linear(3, 3), model)])
def test_what_the_model_does_with_checkpoints(asks: bool, wrap: Callable[[nn.Module], nn.Module]) -> None:
    x, model, other = torch.randn(2, 3), wrap(Renamed(asks)), wrap(Renamed(asks))
    gm = saq_fx.prepare_saq(model, example_inputs=x, precision=None)
    assert gm.state_dict().keys() == model.state_dict().keys()
    older = {name.replace("layer.", "old."): each for name, each in other.state_dict().items()}
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        each.load_state_dict(dict(older))
        assert torch.equal(each(x), other(x))


class Stateful(nn.Module):
    """Keeps a number in checkpoints that is no tensor there; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.layer, self.asks, self.seen = nn.Linear(3, 3), asks, 1

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x * 2 if self.asks and x.sum() > 1e9 else torch.relu(x)


class Asking(nn.Module):
    """Python code, of which the module in it is a part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(lambda model: model, ""), (lambda model: nn.Sequential(model), "0."), (Asking, "inner.")],
)
def test_extra_state_is_in_checkpoints(
    wrap: Callable[[nn.Module], nn.Module], prefix: str, asks: bool, tmp_path: Path
) -> None:
    x, key, model = torch.randn(2, 3), f"{prefix}_extra_state", wrap(Stateful(asks))
    gm = saq_fx.prepare_saq(model, example_inputs=x, precision=None)
    assert gm.state_dict().keys() == model.state_dict().keys()
    gm.load_state_dict({**model.state_dict(), key: {"seen": 5}})
    copied = pickle.loads(pickle.dumps(gm))
    copied.load_state_dict(model.state_dict())
    assert [each.state_dict()[key] for each in (gm, copied, model)] == [{"seen": 5}, {"seen": 1}, {"seen": 1}]
    with pytest.raises(CheckpointError, match=rf"{key} is of type dict, .*: have get_extra_state return a tensor"):
        saq_fx.save(saq_fx.prepare_saq(model, example_inputs=x), tmp_path / "model.safetensors")


class Resizing(nn.Module):
    """Makes room for a buffer of another size before it loads it, and saves another under an older name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("queue", torch.zeros(1, 3))
        self.register_buffer("scale", torch.ones(3))
        self.register_load_state_dict_pre_hook(self.make_room)
        self.register_state_dict_post_hook(self.rename)

    @staticmethod
    def make_room(module: "Resizing", state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        module.queue = torch.zeros_like(state[f"{prefix}queue"])
        state[f"{prefix}scale"] = state.pop(f"{prefix}factor")

    @staticmethod
    def rename(module: "Resizing", state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state[f"{prefix}factor"] = state.pop(f"{prefix}scale")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.queue.sum(0)


def test_hooks_of_checkpoints_see_the_graph() -> None:
    x, other = torch.randn(2, 3), Resizing()
    other.queue, other.scale = torch.ones(4, 3), torch.full((3,), 2.0)
    once = saq_fx.prepare_saq(Resizing(), example_inputs=x, precision=None)
    for gm in (once, saq_fx.prepare_saq(once, example_inputs=x, precision=None), pickle.loads(pickle.dumps(once))):
        assert gm.state_dict().keys() == other.state_dict().keys()
        gm.load_state_dict(other.state_dict())
        assert torch.equal(gm(x), other(x))
