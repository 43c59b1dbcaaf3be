"""Learning from a float model's outputs."""

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T**2 KL(softmax(taught/T) || softmax(outputs/T))`, mean over the batch (Hinton et al., 2015).

    Args:
        outputs, taught: logits of student and teacher, (samples, ..., classes).
    """
    student, teacher = (F.log_softmax(logits.flatten(0, -2) / temperature, -1) for logits in (outputs, taught))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
