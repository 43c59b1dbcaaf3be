"""How long the exact allocation takes: families of scores, networks, limits; one, two and three budgets at once.

Times are of this process's processor, so that other work on the machine counts little. Prints tables, writes JSON.
`python tools/bench_allocation.py [--layers 200] [--budgets 1 2 3] [--only TEXT] [--out FILE]`
"""

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from saq_fx.allocation import Constraint, allocate_under
from saq_fx.precision import write_whole

Floats: TypeAlias = NDArray[np.float64]

BITS = (2, 3, 4, 5, 6), (2, 3, 4, 6, 8)
LIMITS = {
    1: ((0.1,), (0.3,), (0.5,)),
    2: ((0.3, 0.1), (0.2, 0.3), (0.5, 0.5)),
    3: ((0.2, 0.3, 0.3), (0.1, 0.1, 0.1), (0.5, 0.4, 0.6)),
}
"""Where the limits lie between the least totals, 0, and the largest, 1."""
SECONDS = {200: 1.0, 1000: 10.0}  # what is asked for


class Network(NamedTuple):
    """Layers with a pair of bits a choice; sizes are [layers, 1], pairs [choices, 2]: of weights, of activations."""

    macs: Floats
    weights: Floats
    outputs: Floats
    pairs: Floats

    def costs(self) -> tuple[Floats, Floats, Floats]:
        """BitOps, bytes of weights and bytes of activations."""
        weight_bits, activation_bits = self.pairs.T
        bitops = self.macs * weight_bits * activation_bits
        return bitops, self.weights * weight_bits / 8, self.outputs * activation_bits / 8


def distinct(rng: np.random.Generator, layers: int) -> tuple[Floats, ...]:
    """Layers of all sizes."""
    ends = (1e5, 1e9), (1e3, 4e6), (1e3, 1e6)
    return tuple(np.exp(rng.uniform(*np.log(end), (layers, 1))).round() for end in ends)


def repeated(_: np.random.Generator, layers: int) -> tuple[Floats, ...]:
    """A residual network of bottlenecks, whose stages repeat their three convolutions many times."""
    shares = np.array([0.1, 0.2, 0.5, 0.2])
    stage = np.searchsorted(np.cumsum(shares), (np.arange(layers) + 0.5) / layers)
    width, side, place = 64.0 * 2**stage, 56.0 / 2**stage, np.arange(layers) % 3
    weights = np.choose(place, [4 * width**2, 9 * width**2, 4 * width**2])
    outputs = np.choose(place, [width, width, 4 * width]) * side**2
    return (weights * side**2)[:, None], weights[:, None], outputs[:, None]


NETWORKS = {"distinct": distinct, "repeated": repeated}


def uniform(rng: np.random.Generator, network: Network) -> Floats:
    return rng.uniform(size=network.costs()[0].shape)


def gaussian(rng: np.random.Generator, network: Network) -> Floats:
    return rng.normal(size=network.costs()[0].shape)


def ascending(rng: np.random.Generator, network: Network) -> Floats:
    """Random, but more where the product of the bits is more."""
    ranks = network.pairs.prod(axis=1).argsort(kind="stable").argsort(kind="stable")
    return np.sort(uniform(rng, network), axis=1)[:, ranks]


def convex(rng: np.random.Generator, network: Network) -> Floats:
    return _weight(rng, network) * _share(network) ** 2


def concave(rng: np.random.Generator, network: Network) -> Floats:
    return _weight(rng, network) * np.sqrt(_share(network))


def rounding_error(rng: np.random.Generator, network: Network) -> Floats:
    """What quantization of weights and of activations loses, which sensitivities weigh."""
    return -rng.exponential(size=(len(network.macs), 2)) @ (4.0**-network.pairs).T


def noisy_error(rng: np.random.Generator, network: Network) -> Floats:
    scores = rounding_error(rng, network)
    return scores * (1 + 0.1 * rng.normal(size=scores.shape))


def logarithm(_: np.random.Generator, network: Network) -> Floats:
    """The same for all layers."""
    return np.log(network.pairs.prod(axis=1)) + 0 * network.macs


def product(rng: np.random.Generator, network: Network) -> Floats:
    return _weight(rng, network) * network.pairs.prod(axis=1)


def linear(rng: np.random.Generator, network: Network) -> Floats:
    return _weight(rng, network) * network.pairs.sum(axis=1)


def exponential(rng: np.random.Generator, network: Network) -> Floats:
    return -_weight(rng, network) * np.exp(-network.pairs.sum(axis=1) / 2)


def proportional(_: np.random.Generator, network: Network) -> Floats:
    return network.costs()[0]


def almost_proportional(rng: np.random.Generator, network: Network) -> Floats:
    bitops = network.costs()[0]
    return bitops * (1 + 0.01 * rng.normal(size=bitops.shape))


def root_of_cost(_: np.random.Generator, network: Network) -> Floats:
    return np.sqrt(network.costs()[0])


def parts(rng: np.random.Generator, network: Network) -> Floats:
    """One score of the weights' bits and one of the activations', as a search gives them."""
    weight_scores, activation_scores = np.sort(rng.normal(size=(2, len(network.macs), 5)), axis=2)
    return np.repeat(weight_scores, 5, axis=1) + np.tile(activation_scores, 5)


def _weight(rng: np.random.Generator, network: Network) -> Floats:
    return rng.exponential(size=network.macs.shape)


def _share(network: Network) -> Floats:
    product = network.pairs.prod(axis=1)
    return (product - product.min()) / np.ptp(product)


FAMILIES: tuple[Callable[[np.random.Generator, Network], Floats], ...] = (
    uniform,
    gaussian,
    ascending,
    convex,
    concave,
    rounding_error,
    noisy_error,
    logarithm,
    product,
    linear,
    exponential,
    proportional,
    almost_proportional,
    root_of_cost,
    parts,
)


class Instance(NamedTuple):
    """What one problem is made from."""

    budgets: int
    layers: int
    family: str
    network: str
    seed: int  # which limits and bits, too

    def problem(self) -> tuple[list[Constraint], list[list[float]]]:
        """The constraints and the scores."""
        rng = np.random.default_rng(self.seed)
        pairs = np.array([(w, a) for w in BITS[self.seed % 2] for a in BITS[self.seed % 2]], dtype=float)
        network = Network(*NETWORKS[self.network](rng, self.layers), pairs)
        scores = next(family for family in FAMILIES if family.__name__ == self.family)(rng, network)
        limits = LIMITS[self.budgets][self.seed % len(LIMITS[self.budgets])]
        return [_constraint(*each) for each in zip(network.costs(), limits, strict=False)], scores.tolist()


def _constraint(costs: Floats, share: float) -> Constraint:
    least, most = math.fsum(costs.min(axis=1)), math.fsum(costs.max(axis=1))
    return Constraint(costs.tolist(), least + share * (most - least))


def instances(layers: int, budgets: int, seeds: int) -> Iterator[Instance]:
    """Every family on every network, each under several limits."""
    for family in FAMILIES:
        for network in NETWORKS:
            for seed in range(seeds):
                yield Instance(budgets, layers, family.__name__, network, seed)


def measure(instance: Instance) -> dict[str, Any]:
    """The seconds of one allocation, its score, and what a warning says of a proof that is missing."""
    constraints, scores = instance.problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        chosen = allocate_under(constraints, scores)
        seconds = time.process_time() - start
    score = math.fsum(row[index] for row, index in zip(scores, chosen, strict=True))
    return {
        **instance._asdict(),
        "seconds": seconds,
        "score": score,
        "warning": "; ".join(str(w.message) for w in caught),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each number of layers and budgets."""
    keys = sorted({(row["layers"], row["budgets"]) for row in rows})
    lines = []
    for key in keys:
        same = [row for row in rows if (row["layers"], row["budgets"]) == key]
        seconds = np.array([row["seconds"] for row in same])
        asked = SECONDS.get(key[0], math.inf)
        unproven = sum(bool(row["warning"]) for row in same)
        lines.append([*key, len(same), asked, (seconds < asked).sum(), np.median(seconds), seconds.max(), unproven])
    heads = ["layers", "budgets", "instances", "asked, s", "within", "median, s", "most, s", "not proven"]
    return tabulate(lines, heads, floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--budgets", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--seeds", type=int, default=3, help="how many limits, and with them seeds")
    parser.add_argument("--only", default="", help="a part of the families' names")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        for budgets in options.budgets:
            for instance in instances(layers, budgets, options.seeds):
                if options.only in instance.family:
                    rows.append(measure(instance))
                    print(*instance, f"{rows[-1]['seconds']:.2f} s", rows[-1]["warning"], file=sys.stderr, flush=True)
    print(summary(rows))
    if options.out is not None:
        machine = {"python": platform.python_version(), "numpy": np.__version__}
        write_whole(options.out, (json.dumps({"rows": rows, **machine}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
