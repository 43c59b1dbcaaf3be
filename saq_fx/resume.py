"""The state of an interrupted training or search, in one file: what the steps to come depend on."""

import io
import os
import pickle
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from saq_fx.errors import CheckpointError
from saq_fx.precision import write_whole
from saq_fx.quantizers import Quantizer

_FORMAT = "saq_fx.state.2"
_PARTS = {"format", "tensors", "initialized", "optimizers", "random", "values"}


class Generators:
    """The generators that training draws from: torch's on the CPU and on a device, Python's, numpy's, a loader's."""

    def __init__(self, device: torch.device, batches: Any) -> None:
        self._device, self._batches = device, batches

    @property
    def of_loader(self) -> list[torch.Generator]:
        """Those that the loader, or its samplers, were given."""
        by_batch = getattr(self._batches, "batch_sampler", None)
        holders = (self._batches, getattr(self._batches, "sampler", None), by_batch, getattr(by_batch, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return list(dict.fromkeys(each for each in found if isinstance(each, torch.Generator)))

    def state(self) -> list[Any]:
        """Of all, in types that can be sent and safely loaded; that of the device is empty where it is the CPU."""
        of_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.empty(0)
        name, keys, *rest = np.random.get_state()
        of_numpy = (name, torch.tensor(keys, dtype=torch.int64), *rest)
        of_loader = [each.get_state() for each in self.of_loader]
        return [torch.get_rng_state(), of_device, random.getstate(), of_numpy, *of_loader]

    def restore(self, state: list[Any]) -> None:
        """The inverse of `state`."""
        of_cpu, of_device, of_python, (name, keys, *rest), *of_loader = state
        torch.set_rng_state(of_cpu)
        random.setstate(of_python)
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(of_device, self._device)
        for generator, of_generator in zip(self.of_loader, of_loader, strict=True):
            generator.set_state(of_generator)


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What differs, with both values; of what has parts, the first parts that do."""
    found = []
    for name, value in own.items():
        before = saved.get(name)
        if before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            found.append(f"{name} ({'; '.join(differences(before, value)[:3])})")
        else:
            found.append(f"{name} ({before}, here {value})")
    return found


def save_state(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    generators: Generators,
    values: dict[str, Any],
) -> None:
    """Writes tensors of a module, states of optimizers and random generators, and plain values; whole or not at all."""
    state = {
        "format": _FORMAT,
        "tensors": dict(_tensors(module)),
        "initialized": {name: each.initialized for name, each in _quantizers(module)},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": generators.state(),
        "values": values,
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, content.getvalue())


def load_state(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    generators: Generators,
    expected: dict[str, Any],
) -> dict[str, Any]:
    """Restores what `save_state` wrote, and returns the values.

    Args:
        expected: values that the file must have, for it to belong here.

    Raises:
        CheckpointError: the file holds no state, or not one of this module with these values.
    """
    state = _read(path)
    different = [name for name, value in expected.items() if state["values"].get(name) != value]
    tensors = dict(_tensors(module))
    if {name: each.shape for name, each in tensors.items()} != {k: t.shape for k, t in state["tensors"].items()}:
        different.append("layers")
    if different:
        raise CheckpointError(f"{path} is the state of another run: other {', '.join(different)}; remove it, or rename")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state["tensors"][name])
    for name, quantizer in _quantizers(module):
        quantizer.initialized = state["initialized"][name]
    for optimizer, of_optimizer in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(of_optimizer)
    generators.restore(state["random"])
    values: dict[str, Any] = state["values"]
    return values


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("torch did not write it")
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError(f"its format is {state['format']}")
        if missing := _PARTS - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (pickle.UnpicklingError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no state to resume from: {error}; remove it to begin anew") from error
    return state


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    return ((path, each) for path, each in module.named_modules() if isinstance(each, Quantizer))
