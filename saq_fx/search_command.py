"""`saq-fx search`: from names of a model and of data to a policy in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from saq_fx.cost import cost_table
from saq_fx.errors import SaqError
from saq_fx.graph import SaqGraphModule
from saq_fx.image_task import ImageTask
from saq_fx.plots import plot_search
from saq_fx.precision import write_whole
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.report import precision_report
from saq_fx.search import search_precision
from saq_fx.search_result import SearchResult


@dataclass(frozen=True)
class SearchOptions:
    """How the command line asks for it; the fields are its options."""

    folder: Path
    budget: Sequence[str]
    candidates: str
    epochs: int
    batch: int
    result: Path | None


def search(task: ImageTask, options: SearchOptions) -> None:
    """Writes `policy.json`, `report.txt` and, of a new search, `search.json` and `search.png`; prints the report."""
    torch.manual_seed(task.seed)
    model, folder, is_new = task.network(), options.folder, options.result is None
    gm = prepare_saq(model, example_inputs=task.examples(model))
    found = _searched(gm, task, options) if options.result is None else SearchResult.load(options.result)
    if is_new:
        found.save(folder / "search.json")
    policy = found.policy_for(options.budget, costs=cost_table(gm))
    policy.save(folder / "policy.json")
    apply_policy(gm, policy)
    report = precision_report(gm)
    write_whole(folder / "report.txt", f"{report}\n".encode())
    print(report)
    if is_new:
        plot_search(found.history, folder / "search.png")  # last, for it needs an extra
    print(f"\npolicy.json, report.txt{', search.json and search.png' * is_new} are in {folder}/")


def _searched(gm: SaqGraphModule, task: ImageTask, options: SearchOptions) -> SearchResult:
    batches = task.batches(options.batch)
    if not len(batches):
        raise SaqError(f"--batch {options.batch} leaves no batch of {task.data}: make it smaller")
    return search_precision(
        gm.to("cuda" if torch.cuda.is_available() else "cpu"),
        batches,
        F.cross_entropy,
        budget=options.budget,
        candidates=_candidates(options.candidates),
        steps=options.epochs * len(batches),
        checkpoint=options.folder / "checkpoint.pt",
    )


def _candidates(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise SaqError(f"--candidates {text!r} is not a list of bits like 2,3,4,6") from error
