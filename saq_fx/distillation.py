"""Learning from a float model's outputs."""

from torch import Tensor
from torch.nn import functional as F

from saq_fx.errors import TrainingError


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T**2 KL(softmax(taught/T) || softmax(outputs/T))`, mean over all but the classes (Hinton et al., 2015).

    Args:
        outputs, taught: logits of student and teacher, (samples, classes, ...) as for `cross_entropy`.

    Raises:
        TrainingError: they are not tensors of one shape, of at least two axes.
    """
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (outputs, taught)]
    if shapes[0] != shapes[1] or len(shapes[0]) < 2 or isinstance(shapes[0], str):
        raise TrainingError(
            f"distillation compares logits, (samples, classes, ...): the graph gives {shapes[0]}, the teacher "
            f"{shapes[1]}"
        )
    rows = (logits.movedim(1, -1).flatten(0, -2) for logits in (outputs, taught))
    student, teacher = (F.log_softmax(each / temperature, -1) for each in rows)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
