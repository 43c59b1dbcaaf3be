"""Models by name, for the command line: `torchvision:resnet18`, `timm:…`, `hf:…`, `path/to/file.py:factory`."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from saq_fx.errors import MissingExtraError, SaqError

FORMS = "torchvision:NAME, timm:NAME, hf:MODEL_TYPE or path/to/file.py:FACTORY"


def build(name: str) -> nn.Module:
    """Makes a model with random weights from its name.

    Raises:
        SaqError: the name has none of the forms, or its library or file does not know it.
        MissingExtraError: its library is not installed.
    """
    source, _, rest = name.rpartition(":") if ".py:" in name else name.partition(":")
    if not source or not rest:
        raise SaqError(f"{name!r} names no model: write {FORMS}")
    if source.endswith(".py"):
        return _from_file(Path(source), rest)
    makers = {"torchvision": _from_torchvision, "timm": _from_timm, "hf": _from_transformers}
    if source not in makers:
        raise SaqError(f"{name!r}: unknown source {source!r}; write {FORMS}")
    try:
        return makers[source](rest)
    except (ValueError, RuntimeError, KeyError) as error:
        raise SaqError(f"{source} does not make a model {rest!r}: {error}") from error


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"this model needs {name}: pip install {extra}") from error


def _from_torchvision(name: str) -> nn.Module:
    models: Any = _library("torchvision.models", "'saq_fx[vision]'")
    model: nn.Module = models.get_model(name, weights=None)
    return model


def _from_timm(name: str) -> nn.Module:
    model: nn.Module = _library("timm", "timm").create_model(name, pretrained=False)
    return model


def _from_transformers(model_type: str) -> nn.Module:
    transformers: Any = _library("transformers", "transformers")
    model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type))
    return model


def _from_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise SaqError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SaqError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, factory, None)
    if not callable(make):
        raise SaqError(f"{path} has no function {factory!r} that makes a model")
    model = make()
    if not isinstance(model, nn.Module):
        raise SaqError(f"{path}:{factory} returned {type(model).__name__}, not an nn.Module")
    return model
