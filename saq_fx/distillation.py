"""Learning from a float model's outputs."""

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T**2 KL(softmax(taught/T) || softmax(outputs/T))`, mean over all but the classes (Hinton et al., 2015).

    Args:
        outputs, taught: logits of student and teacher, (samples, classes, ...) as for `cross_entropy`.
    """
    rows = (logits.movedim(1, -1).flatten(0, -2) for logits in (outputs, taught))
    student, teacher = (F.log_softmax(each / temperature, -1) for each in rows)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
