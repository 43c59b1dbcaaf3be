"""What a sharpness-aware step of a module moves: quantized weights through leaves, other parameters in place."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress

from torch import Tensor, nn

from saq_fx.errors import TrainingError
from saq_fx.gradients import gradient_of
from saq_fx.graph import SaqGraphModule
from saq_fx.parallel import Workers, local
from saq_fx.pass_base import Pipeline
from saq_fx.passes.insert_perturbations import (
    InsertPerturbations,
    Leaf,
    make_leaves,
    perturbed_weights,
    zero_deltas,
)
from saq_fx.sharpness import Ascent, global_norm, scaled_by_size


class AscentStep:
    """The step to where the second gradient is taken; building it puts leaves into the graphs of a module.

    Args:
        module: holds the graphs.
        kinds: what each of its parameters is: "weight", "bias", "norm" or "clipping".
        workers: those that train it together.
        case: where weights are perturbed: see `InsertPerturbations`.
        perturb: the kinds that are perturbed besides weights.
        adaptive: whether each value moves in proportion to its size.
    """

    def __init__(
        self,
        module: nn.Module,
        kinds: Mapping[nn.Parameter, str],
        workers: Workers,
        *,
        case: int,
        perturb: Collection[str],
        adaptive: bool,
    ) -> None:
        self._workers, self._case, self._adaptive = workers, case, adaptive
        graphs = _outermost_graphs(module)
        for graph in graphs:
            Pipeline((InsertPerturbations(case),)).run(graph)
        self._weights = [weight for graph in graphs for weight in perturbed_weights(graph)]
        self._kept: list[Leaf] = []
        behind_quantizers = {parameter for weight in self._weights for parameter in weight.parameters}
        moved = {parameter for parameter, kind in kinds.items() if kind in ("weight", *perturb)}
        self._in_place = moved - behind_quantizers

    @contextmanager
    def leaves(self) -> Iterator[Sequence[Leaf]]:
        """Within: the leaves of all weights are in the graphs, at zero.

        Raises:
            TrainingError: the graphs no longer hold them.
        """
        if not all(weight.is_current() for weight in self._weights):
            raise TrainingError(
                "the graph no longer has the leaves that this SAQ put into it: another SAQ or pass took them; build "
                "SAQ anew"
            )
        # Kept from step to step: on CPUs, memory that is new costs more than the arithmetic on it.
        kinds = [(weight.parameters[0].dtype, weight.parameters[0].device) for weight in self._weights]
        if kinds != [(delta.dtype, delta.device) for _, delta in self._kept]:
            self._kept = make_leaves(self._weights)
        with zero_deltas(self._weights, self._kept) as leaves:
            yield leaves

    def weight_codes(self) -> list[Tensor]:
        """The quantized weights in integers, in case 2: a perturbation may fail to move them there."""
        if self._case != 2 or self._workers.sharded:
            return []
        return [weight.codes() for weight in self._weights]

    def find(self, parameters: Collection[nn.Parameter], leaves: Sequence[Leaf]) -> Ascent:
        """What is moved and where to, from the gradients that these parameters, and the leaves, have."""
        trained = set(parameters)
        active = [not trained.isdisjoint(weight.parameters) for weight in self._weights]
        deltas = [delta for _, delta in compress(leaves, active)]
        directions = [gradient_of(source) for source, _ in compress(leaves, active)]
        in_place = [parameter for parameter in parameters if parameter in self._in_place]
        moved, in_place_directions = [local(p) for p in in_place], [gradient_of(p) for p in in_place]
        if self._workers.sharded:
            self._workers.average(directions)
        if self._adaptive:
            values = [weight.value() for weight in compress(self._weights, active)] + moved
            directions, norm = scaled_by_size(directions + in_place_directions, values)
            directions, in_place_directions = directions[: len(deltas)], directions[len(deltas) :]
        else:
            norm = math.hypot(float(global_norm(directions)), self._workers.norm(in_place_directions))
        return Ascent(deltas, directions, moved, in_place_directions, norm)


def _outermost_graphs(module: nn.Module) -> list[SaqGraphModule]:
    if isinstance(module, SaqGraphModule):
        return [module]
    return list(dict.fromkeys(graph for child in module.children() for graph in _outermost_graphs(child)))
