"""Saving a prepared model and loading it into the float model's code again."""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from saq_fx.annotation import record_of
from saq_fx.errors import CheckpointError, PatternError, PrecisionError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.inputs import ExampleInputs
from saq_fx.pass_base import check_facts
from saq_fx.precision import Policy, write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe

_FORMAT = "saq_fx"
_VERSION = 1


def policy_of(gm: SaqGraphModule) -> Policy:
    """The bits that every layer of a prepared model has now, under exact names.

    Raises:
        PassError: the graph was prepared with precision=None.
    """
    check_facts(gm, frozenset({"annotations", "precision"}), "policy_of")
    return Policy({layer.name: layer.precision for _, layer in layers(gm) if layer.precision is not None})


def save(gm: SaqGraphModule, path: str | os.PathLike[str]) -> None:
    """Writes weights, clipping levels, policy and recipe to one safetensors file, whole or not at all.

    Raises:
        PassError: the graph has no quantizers.
        CheckpointError: the model has state that is no tensor.
    """
    check_facts(gm, frozenset({"quantizers"}), "save")
    recipe, state = record_of(gm).recipe or Recipe(), gm.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} is of type {type(value).__name__}, and this file holds tensors only: have get_extra_state "
                "return a tensor, or keep gm.state_dict() by torch.save"
            )
    tensors, aliases = _without_aliases(state)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "policy": policy_of(gm).to_json(),
        "recipe": json.dumps(recipe.to_dict()),
        "aliases": json.dumps(aliases),
    }
    write_whole(path, safetensors.torch.save(tensors, metadata=header))


def load(
    model: nn.Module, path: str | os.PathLike[str], *, example_inputs: ExampleInputs | None = None
) -> SaqGraphModule:
    """Prepares a float model with a saved file's policy and recipe, and loads its weights and clipping levels.

    Args:
        model: the model that the saved graph was prepared from; its weights do not matter.
        example_inputs: as for `prepare_saq`.

    Raises:
        CheckpointError: the file is not one that `save` wrote, is damaged, or does not fit the model.
    """
    header, tensors = _read(path)
    try:
        policy = Policy.from_json(header["policy"])
        recipe = Recipe.from_dict(json.loads(header["recipe"]))
        aliases = {name: tensors[kept] for name, kept in json.loads(header["aliases"]).items()}
    except (CheckpointError, PrecisionError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}") from error
    try:
        gm = prepare_saq(model, example_inputs=example_inputs, precision=policy, recipe=recipe)
    except PatternError as error:
        raise CheckpointError(f"{path} was saved from another model than {type(model).__name__}: {error}") from error
    state = tensors | aliases
    for name, own in gm.state_dict().items():
        if own.layout is not torch.strided and name in state:
            state[name] = state[name].to_sparse(layout=own.layout)
    try:
        gm.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return gm


def _without_aliases(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and further names of it -> that one (safetensors stores no sharing)."""
    kept: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, held in state.items():
        tensor = held if held.layout is torch.strided else held.to_dense()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if first.setdefault(key, name) == name:
            kept[name] = tensor.detach().contiguous().clone()
        else:
            aliases[name] = first[key]
    return kept, aliases


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was not written by saq_fx.save: load a float checkpoint with load_state_dict instead"
        )
    version = header.get("version", "none")
    if not version.isdigit() or int(version) > _VERSION:
        raise CheckpointError(f"{path} has format version {version}; this saq_fx reads up to {_VERSION}")
    return header, tensors
