"""Modules that `torch.compile` has made of others, within a model: they are taken as if they had not been compiled."""

from typing import Any

import torch
from torch import nn

from saq_fx.held import STRUCTURE, modules_in, replace_references


class Uncompiled(nn.Module):
    """What `torch.compile` has made of a module, under the same names, as if it had not been compiled."""

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(compiled).items() if name in STRUCTURE})
        self.training = compiled.training

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self._orig_mod(*args, **kwargs)


def uncompile(model: nn.Module) -> None:
    """Puts plain modules of the same names in the place of compiled ones."""
    modules = modules_in(model)
    compiled = [each for each in modules if "_orig_mod" in each._modules]
    plain = {each: Uncompiled(each) for each in compiled if isinstance(each, torch._dynamo.OptimizedModule)}
    for module in modules if plain else ():
        module._modules.update({name: plain[each] for name, each in module._modules.items() if each in plain})
        replace_references(module, plain)
