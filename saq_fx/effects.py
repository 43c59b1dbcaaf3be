"""Operations that do more than return a value: they write into tensors, draw random numbers, or check something."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.operation_names import writes_first

# What is random, by the names of functions and methods.
_RANDOM = {
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "feature_dropout", "native_dropout", "gumbel_softmax", "rrelu", "fractional_max_pool2d",
    "fractional_max_pool3d", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_",
    "log_normal_",
}  # fmt: skip
_RANDOM_BY_ARGUMENT = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_STATISTICS = {"batch_norm", "instance_norm", "native_batch_norm"}
# Of this library and of torch: what raises errors, or opens and closes scopes.
_CHANGES_HISTORY = {"requires_grad_", "detach_", "retain_grad"}
_WITHOUT_VALUE = {
    "require_same_path",
    "require_default",
    "require_given",
    "switch_autocast",
    "_assert",
    "_set_grad_enabled",
}
_KNOWN = ("torch", "torchvision", "saq_fx", "math", "operator", "_operator", "builtins")


def has_effects(node: fx.Node) -> bool:
    """Whether a function or a method does more than return a value; one of unknown origin may do anything."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node.target)
    if is_random(node) or writes_first(node) or name in _WITHOUT_VALUE | _CHANGES_HISTORY or "out" in node.kwargs:
        return True
    if name in _RANDOM_BY_ARGUMENT:
        return any(isinstance(each, float) and each > 0 for each in (*node.args, node.kwargs.get("dropout_p")))
    if name in _STATISTICS:
        return len(node.all_input_nodes) > 1
    if name == "embedding":
        return node.kwargs.get("max_norm") is not None
    module = getattr(node.target, "__module__", None) or "torch"
    return name == "apply_function" or module.partition(".")[0] not in _KNOWN


def is_random(node: fx.Node) -> bool:
    """Whether a function or a method draws random numbers."""
    return node.op in ("call_function", "call_method") and _name(node.target) in _RANDOM


def follows_mode(module: nn.Module) -> bool:
    """Whether a leaf does more in training than return a value."""
    dropout = getattr(module, "dropout", 0)
    return (
        not type(module).__module__.startswith("torch.nn.")
        or isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU)
        or any(True for _ in module.buffers())
        or (isinstance(dropout, float) and dropout > 0)
    )


def _name(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


@dataclass(frozen=True)
class OnlyIn:
    """A function, or a method by its name, that has its effects in one mode only; a graph calls it with the mode.

    In the other mode it returns None, or, where `used`, what the function returns on copies of its arguments.
    """

    function: Callable[..., Any] | str
    training: bool
    used: bool

    @property
    def __name__(self) -> str:
        """What code calls it."""
        return f"{_name(self.function)}_in_{'training' if self.training else 'evaluation'}"

    def __call__(self, training: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the function if the mode is its own."""
        if training == self.training:
            return self._run(args, kwargs)
        if not self.used or _name(self.function) in _WITHOUT_VALUE:
            return None
        devices: set[torch.device] = set()
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda item: _copied(item, devices))
        with torch.random.fork_rng(devices=devices):
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


def _copied(item: Any, devices: set[torch.device]) -> Any:
    device = item.device if isinstance(item, Tensor) else item
    if isinstance(device, torch.device) and device.type == "cuda":
        devices.add(device)
    if isinstance(item, torch.Generator):
        return item.clone_state()
    return item.clone() if isinstance(item, Tensor) else item
