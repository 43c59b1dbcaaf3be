"""The command line: `saq-fx report | search | train | demo`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

from saq_fx.errors import MissingExtraError, SaqError

if TYPE_CHECKING:
    import typer


def _app() -> "typer.Typer":
    """The commands; made in here since typer, which reads their arguments off them, is an extra."""
    try:
        import typer
    except ImportError as error:
        raise MissingExtraError("the command line needs typer: pip install 'saq_fx[cli]'") from error

    app = typer.Typer(
        help="Low-bit networks: reports, searches and trains mixed precision.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def report(
        model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:TYPE or path/to/file.py:FACTORY")],
        shape: Annotated[str, typer.Option(help="Shape of one input, with the batch axis.")] = "1,3,224,224",
        precision: Annotated[str, typer.Option(help="W4A4 and the like, or 'float'.")] = "W4A4",
        policy: Annotated[Path | None, typer.Option(help="A policy file; overrides --precision.")] = None,
        format: Annotated[str, typer.Option(help="text, markdown, csv, json or html.")] = "text",
    ) -> None:
        """Print what every layer of a model costs: MACs, bits, BitOps, bytes."""
        print(_report(model, shape, precision, policy, format))

    @app.command()
    def search(
        model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:TYPE or path/to/file.py:FACTORY")],
        data: Annotated[str, typer.Option(help="digits, or {cifar10,cifar100,imagenet,flowers102,pets}:FOLDER")],
        budget: Annotated[list[str], typer.Option(help="34.7G, 0.5xW8A8, avg4 or 11MB; several are all kept.")],
        folder: Annotated[Path, typer.Option(help="For the policy, the search, its checkpoint and its picture.")],
        candidates: Annotated[str, typer.Option(help="Bits to choose from.")] = "2,3,4,6",
        weights: Annotated[Path | None, typer.Option(help="The float model's state dict (torch.save).")] = None,
        result: Annotated[
            Path | None, typer.Option(help="The search.json of another budget or network: solved anew, not searched.")
        ] = None,
        epochs: Annotated[int, typer.Option(help="Rounds through the training images.", min=1)] = 10,
        batch: Annotated[int, typer.Option(help="Images per step.", min=1)] = 64,
        workers: Annotated[int, typer.Option(help="Processes that read images.", min=0)] = 0,
        seed: Annotated[int, typer.Option(help="Of initial weights and the order of images.")] = 0,
    ) -> None:
        """Search the bits of every layer under a budget; the same command goes on with an interrupted search."""
        from saq_fx.image_task import ImageTask
        from saq_fx.search_command import SearchOptions, search

        task = ImageTask(model, data, weights, workers, seed)
        search(task, SearchOptions(folder, budget, candidates, epochs, batch, result))

    @app.command()
    def train(
        model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:TYPE or path/to/file.py:FACTORY")],
        data: Annotated[str, typer.Option(help="digits, or {cifar10,cifar100,imagenet,flowers102,pets}:FOLDER")],
        folder: Annotated[Path, typer.Option(help="For checkpoints, logs, report and the trained model.")],
        precision: Annotated[str | None, typer.Option(help="W4A4, the default, or that of --paper.")] = None,
        policy: Annotated[Path | None, typer.Option(help="A policy file; overrides --precision.")] = None,
        weights: Annotated[Path | None, typer.Option(help="The float model's state dict (torch.save).")] = None,
        paper: Annotated[str, typer.Option(help="Settings of the SAQ paper: resnet18:4 and the like.")] = "",
        epochs: Annotated[int | None, typer.Option(help="Instead of the settings' own.")] = None,
        lr: Annotated[float | None, typer.Option(help="Instead of the settings' own.")] = None,
        rho: Annotated[float | None, typer.Option(help="Instead of the settings' own.")] = None,
        batch: Annotated[int | None, typer.Option(help="Images per step of all processes.")] = None,
        offsets: Annotated[bool, typer.Option(help="Learned offsets of all activations (MobileNetV2).")] = False,
        mixed_precision: Annotated[str | None, typer.Option(help="bf16, fp16 or no.")] = None,
        workers: Annotated[int, typer.Option(help="Processes that read images.", min=0)] = 0,
        seed: Annotated[int, typer.Option(help="Of initial weights and the order of images.")] = 0,
    ) -> None:
        """Train a quantized model by SAQ; the same command goes on with an interrupted run. Takes torchrun."""
        from saq_fx.image_task import ImageTask
        from saq_fx.train_command import TrainOptions, train

        task = ImageTask(model, data, weights, workers, seed)
        changes = {"epochs": epochs, "lr": lr, "rho": rho, "batch_size": batch}
        train(task, TrainOptions(folder, precision, policy, paper, changes, offsets, mixed_precision))

    @app.command()
    def demo(
        folder: Annotated[Path, typer.Option(help="Where the results go.")] = Path("demo_output"),
        quick: Annotated[bool, typer.Option(help="A tenth of the training, to see that everything runs.")] = False,
        seed: Annotated[int, typer.Option(help="Of initial weights and batches.")] = 0,
    ) -> None:
        """Train, search and quantize a small network on real digits, and report it."""
        from saq_fx.demo import run_demo

        run_demo(folder, quick=quick, seed=seed)

    return app


def _report(model: str, shape: str, precision: str, policy: Path | None, style: str) -> str:
    from saq_fx import Policy, precision_report, prepare_saq
    from saq_fx.models import build

    try:
        example = torch.zeros([int(size) for size in shape.split(",")])
    except (ValueError, RuntimeError) as error:
        raise SaqError(f"--shape {shape!r} is not a list of sizes like 1,3,224,224") from error
    wanted = Policy.load(policy) if policy is not None else None if precision == "float" else precision
    result = precision_report(prepare_saq(build(model).eval(), example_inputs=example, precision=wanted))
    styles = {
        "text": result.__str__,
        "markdown": result.to_markdown,
        "csv": result.to_csv,
        "json": result.to_json,
        "html": result.to_html,
    }
    if style not in styles:
        raise SaqError(f"--format {style!r} is unknown: use one of {', '.join(styles)}")
    return styles[style]()


def main() -> None:
    """Runs the command line; errors of the user's input are one line on stderr and exit code 1."""
    try:
        _app()()
    except (SaqError, OSError) as error:
        print(f"saq-fx: {error}", file=sys.stderr)
        sys.exit(1)
