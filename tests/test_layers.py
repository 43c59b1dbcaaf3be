"""The layers of the code, held on the source: imports point down and in no circle; parts stand alone."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES_LAYER = 3
LAYERS = {
    0: "errors precision recipe fake_quantization fitting quantizers mixtures sharpness allocation knapsack "
    "knapsack_core knapsack_join knapsack_search batching parallel parameters training_recipe direction "
    "distillation gradients nested mac_counter",
    1: "alignment annotation attention bytecode capture checkpoint_hooks compiled copying dataflow eager effects "
    "example_values exported given graph guards held hooks inputs modes mutation operation_names operators "
    "parametrized parts pass_base patching pickling places products proxies recording resizing rewriting runtime "
    "scopes shapes signs state symbolic tracing uncounted",
    2: "cost choices report resume two_passes",
    3: "training step ascent_step",
    4: "__init__ prepare search search_result baselines checkpoint data models networks plots cli demo image_task "
    "search_command train_command",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}
# What a module must work, and be tested, without.
BANNED = {
    "saq_fx.errors": "torch",
    "saq_fx.precision": "torch",
    "saq_fx.allocation": "torch",
    "saq_fx.knapsack": "torch",
    "saq_fx.knapsack_core": "torch",
    "saq_fx.knapsack_join": "torch",
    "saq_fx.knapsack_search": "torch",
    "saq_fx.fake_quantization": "torch.fx",
    "saq_fx.quantizers": "torch.fx",
    "saq_fx.mixtures": "torch.fx",
    "saq_fx.sharpness": "torch.fx",
}


def module_name(path: Path) -> str:
    """`passes/calibrate.py` -> `saq_fx.passes.calibrate`; `saq_fx/__init__.py` -> `saq_fx`."""
    package = "saq_fx.passes" if path.parent.name == "passes" else "saq_fx"
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


SOURCES = {module_name(path): path for folder in ("saq_fx", "passes") for path in sorted((ROOT / folder).glob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int | None:
    """The layer of a module of the project, None where the table lacks it."""
    if is_within(name, "saq_fx.passes"):
        return PASSES_LAYER
    return LAYER_OF.get(name.removeprefix("saq_fx.") if "." in name else "__init__")


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Each module that `name` imports, with its line; of `from m import n`, `m.n` if that is a module."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in SOURCES or full == "torch.fx" else base), node.lineno


def test_table_names_every_module_and_no_other() -> None:
    modules = {path.stem for path in (ROOT / "saq_fx").glob("*.py")}
    missing, gone = sorted(modules - LAYER_OF.keys()), sorted(LAYER_OF.keys() - modules)
    assert not missing, f"give these modules a layer in LAYERS: {missing}"
    assert not gone, f"these modules do not exist, take them out of LAYERS: {gone}"


def test_no_folder_is_outside_the_layers() -> None:
    nested = [str(path.relative_to(ROOT)) for folder in ("saq_fx", "passes") for path in (ROOT / folder).glob("*/*.py")]
    assert not nested, f"packages within packages are neither mapped in pyproject.toml nor layered here: {nested}"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name: str) -> None:
    own = layer(name)
    assert own is not None, f"{name} has no layer in LAYERS"
    wrong = [
        f"line {line}: {target} (layer {layer(target)})"
        for target, line in imports(name)
        if is_within(target, "saq_fx") and ((above := layer(target)) is None or above > own)
    ]
    assert not wrong, f"{name} is in layer {own} and imports upwards: {wrong}"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_are_absolute(name: str) -> None:
    wrong = [
        f"line {line}: {target}"
        for target, line in imports(name)
        if target.startswith(".") or is_within(target, "passes")
    ]
    assert not wrong, f"{name}: write saq_fx... or saq_fx.passes... instead of {wrong}"


def test_imports_run_in_no_circle() -> None:
    graph = {name: {target for target, _ in imports(name) if target in SOURCES} for name in SOURCES}
    TopologicalSorter(graph).prepare()  # a CycleError names the modules of the circle


@pytest.mark.parametrize("name", BANNED)
def test_part_stands_alone(name: str) -> None:
    banned = BANNED[name]
    wrong = [f"line {line}: {target}" for target, line in imports(name) if is_within(target, banned)]
    assert not wrong, f"{name} must work without {banned}: {wrong}"


@pytest.mark.parametrize("name", SOURCES)
def test_only_annotation_touches_node_meta(name: str) -> None:
    lines = [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute) and node.attr == "meta"]
    assert not lines or name == "saq_fx.annotation", f"{name} uses .meta on lines {lines}: call saq_fx.annotation"
