"""What the parameters of a network are for: weights, biases, normalization, clipping levels."""

from typing import Any

from torch import Tensor, nn

from saq_fx.quantizers import Quantizer


def parameter_kinds(module: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter of a module with its kind: "weight", "bias", "norm" or "clipping".

    Clipping are all parameters of quantizers, whatever their shape. Of the others, those with two dimensions
    or more are weights, except those of LayerNorm; biases of normalization layers, and all further scales, are norm.
    """
    kinds: dict[nn.Parameter, str] = {}
    for owner in module.modules():
        if isinstance(owner, Quantizer):
            kinds.update(dict.fromkeys(owner.parameters(), "clipping"))
        for name, parameter in owner.named_parameters(recurse=False):
            kinds.setdefault(parameter, _kind(owner, name, parameter))
    return kinds


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(owner, nn.LayerNorm | nn.RMSNorm):
        return "norm"  # over several axes, it has a scale of several
    if parameter.dim() >= 2:
        return "weight"
    # Told by shape, not class: rewritten graphs keep a layer's parameters, but not its class.
    scale = getattr(owner, "weight", None)
    is_norm = isinstance(scale, Tensor) and scale.dim() == 1
    return "bias" if "bias" in name and not is_norm else "norm"  # recurrent layers have bias_ih_l0 and the like


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, with weight decay on weights only: decay on clipping levels would ruin them.

    Args:
        module: a prepared model, or any other.
        weight_decay: that of the weights; biases, norm scale and shift, and quantizer parameters get none.
    """
    trainable = {parameter: kind for parameter, kind in parameter_kinds(module).items() if parameter.requires_grad}
    weights = [parameter for parameter, kind in trainable.items() if kind == "weight"]
    others = [parameter for parameter, kind in trainable.items() if kind != "weight"]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
