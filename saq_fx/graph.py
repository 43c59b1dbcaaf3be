"""The graph module that the compiler works on: an `fx.GraphModule` that loses nothing when copied or pickled."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import new_class
from typing import Any

from torch import fx, nn

from saq_fx import annotation, checkpoint_hooks
from saq_fx.annotation import LayerAnnotation, join_path, record_of
from saq_fx.eager import keep_forward, run_eagerly
from saq_fx.errors import TracingError
from saq_fx.parametrized import add_properties, plain_class
from saq_fx.pickling import dump_graph, load_graph
from saq_fx.precision import Precision


class _Forward:
    """The `forward` of a graph whose code is out of date: to ask for it, in order to call it or not, generates it."""

    def __get__(self, gm: "SaqGraphModule | None", owner: type) -> Any:
        if gm is None:
            return self
        for _, each in graphs(gm):  # what compiles a model finds its parts up to date
            each.generate_code()
        return gm.forward


class SaqGraphModule(fx.GraphModule):
    """A traced model whose parameters, names, annotations and record survive every kind of copy.

    `fx.GraphModule` keeps only what its graph refers to and drops `node.meta` on pickling. This one keeps all
    parameters and buffers of the model (so that float checkpoints load) and pickles the graph itself.

    Its code is generated when it is first asked for, as in torch's own lazy graph modules: passes come first, one after
    the other, and many graphs are never run (those that a search relaxes copies of).
    """

    forward: Callable[..., Any] = _Forward()  # type: ignore[assignment]

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "SaqGraphModule") -> None:
        super().__init__(root, graph, class_name)
        _complete(self, root)
        self.training = root.training
        self.register_load_state_dict_post_hook(_read_bits)  # type: ignore[no-untyped-call]

    @classmethod
    def around(cls, model: nn.Module, graph: fx.Graph) -> "SaqGraphModule":
        """A module that has all that `model` has, and a graph that runs its forward as `get_attr python_model`."""
        gm = cls(nn.Module(), fx.Graph(), type(model).__name__)
        hooks = {table: vars(gm)[table] for table in checkpoint_hooks.TABLES}
        vars(gm).update({**vars(model), **hooks})
        keep_forward(gm, model)
        checkpoint_hooks.take(gm, model)
        vars(gm)["_python_class"] = type(model)
        gm.graph = graph
        return gm

    def train(self, mode: bool = True) -> "SaqGraphModule":
        """Sets the mode as the model does, which may keep some modules (a frozen BatchNorm) in another."""
        super().train(mode)
        for path, other in vars(self).get("_kept_modes", {}).get(mode, {}).items():
            for each in (path, join_path(path, "training_flag")):
                with suppress(AttributeError):
                    self.get_submodule(each).training = other
        return self

    def keep_modes(self, modes: Mapping[bool, Mapping[str, bool]]) -> None:
        """Sets the modules, by path, that `train()` (True) and `eval()` (False) leave in a mode of their own."""
        vars(self)["_kept_modes"] = modes

    @property
    def python_model(self) -> nn.Module:
        """This module as an object of the class of the model that `around` was given; both have one state."""
        kind: Any = self._python_class
        model: nn.Module = object.__new__(kind)
        object.__setattr__(model, "__dict__", self.__dict__)  # whatever the class does with attributes
        return model

    def act_as(self, module: nn.Module) -> None:
        """Gives a graph the class, the attributes and the children of its module, for Python code that reads them.

        Raises:
            TracingError: the module has a name that graph modules use for something else.
        """
        taken = sorted(name for name in _GRAPH_NAMES.intersection(dir(module)) if not name.startswith("__"))
        if taken:
            raise TracingError(f"{type(module).__name__}.{taken[0]} has the name of an attribute of graphs: rename it")
        for name, value in vars(module).items():
            if name != "forward":
                vars(self).setdefault(name, value)
        for kind in ("_parameters", "_buffers"):
            for name, value in vars(module)[kind].items():
                vars(self)[kind].setdefault(name, value)  # those that are None: a layer without bias
        added = {name: child for name, child in self._modules.items() if name not in module._modules}
        self._modules = {**module._modules, **added}
        vars(self)["_acts_as"] = plain_class(module)
        self._take_class()

    def _take_class(self) -> None:
        if "_acts_as" in vars(self):
            self.__class__ = new_class("GraphModuleImpl", (SaqGraphModule, vars(self)["_acts_as"]))
            add_properties(self)

    @property
    def code(self) -> str:
        """The code that a call runs."""
        self.generate_code()
        return super().code

    def __str__(self) -> str:
        self.generate_code()
        return super().__str__()

    def recompile(self) -> Any:
        """Has the code generated anew, from the graph as it is when the code is next asked for."""
        type(self).forward = _Forward()  # type: ignore[assignment]

    def generate_code(self) -> None:
        """Brings the code up to date, also of a graph whose class something was put around."""
        if not isinstance(type(self).forward, _Forward):
            return
        super().recompile()
        outer, *bases = type(self).__mro__
        if any("_wrapped_call" in vars(base) for base in bases):
            # fully_shard put a class around fx's own: two such calls, one in the other, would never end.
            del outer.__call__, outer._wrapped_call  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> "SaqGraphModule":
        copied: SaqGraphModule = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = {key: value for key, value in self.__dict__.items() if key != "_graph"}
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied._take_class()
        copied.graph = copy.deepcopy(self.graph, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_graph", "_code")}
        # The state comes after the object, for what is in it may refer to it.
        return _empty, (), (state, dump_graph(self.graph)), None, None, _rebuild


# What graph modules have that others have not.
_GRAPH_NAMES = {*dir(SaqGraphModule), *dir(fx.GraphModule({}, fx.Graph()))} - set(dir(nn.Module()))


def _complete(module: nn.Module, model: nn.Module) -> None:
    """Gives a module all tensors of its model, in the order of that, and its hooks of checkpoints."""
    if module is model:
        return
    checkpoint_hooks.take(module, model)
    for kind in ("_parameters", "_buffers"):
        held = vars(module)[kind]
        for name, tensor in vars(model)[kind].items():
            if name in held or tensor is not None:
                held[name] = held.pop(name, tensor)
    # Constants that were met while tracing are no buffers of the model.
    added = vars(module)["_buffers"].keys() - model._buffers.keys()
    module._non_persistent_buffers_set.update(added, model._non_persistent_buffers_set)
    for name, of_model in model._modules.items():
        if of_model is None:
            continue
        known = module._modules.pop(name, None)
        child = nn.Module() if known is None else known
        _complete(child, of_model)
        if known is not None or child._parameters or child._buffers or child._modules:
            module._modules[name] = child


def _empty() -> SaqGraphModule:
    module: SaqGraphModule = SaqGraphModule.__new__(SaqGraphModule)
    return module


def _rebuild(module: SaqGraphModule, dumped: tuple[dict[str, Any], dict[str, Any]]) -> None:
    state, graph = dumped
    module.__dict__.update(state)
    module._take_class()
    module.graph = load_graph(graph)


def _read_bits(gm: Any, incompatible_keys: Any) -> None:
    """After loading a state dict, annotations have the bits that its quantizers brought along."""
    for node, layer in layers(gm):
        if layer.precision is None or layer.weight_quantizer is None:
            continue
        weight, activation = layer.precision.weight, layer.precision.activation
        # A mixture has no bits of its own: the annotation keeps those of before the search.
        weight = getattr(gm.get_submodule(layer.weight_quantizer), "bits", weight)
        if layer.input_quantizer is not None:
            activation = getattr(gm.get_submodule(layer.input_quantizer), "bits", activation)
        annotation.update(node, precision=Precision(weight, activation))


def call_arguments(node: fx.Node, values: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a node's function is called with. Lists are new ones, as in compiled code: some functions change them."""
    args = tuple(_with_values(each, values) for each in node.args)
    return args, {name: _with_values(each, values) for name, each in node.kwargs.items()}


def _with_values(value: Any, values: Callable[[fx.Node], Any]) -> Any:
    if isinstance(value, fx.Node):
        return values(value)
    if isinstance(value, slice):
        return slice(*(_with_values(each, values) for each in (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        items = (_with_values(each, values) for each in value)
        if isinstance(value, list):
            return list(items)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return {key: _with_values(each, values) for key, each in value.items()} if isinstance(value, dict) else value


def graphs(gm: fx.GraphModule, path: str = "") -> Iterator[tuple[str, SaqGraphModule]]:
    """A captured model's graph and those of its parts, each with its path; a part comes after what holds it."""
    yield path, gm  # type: ignore[misc]
    for inner, part in parts_of(gm).items():
        yield from graphs(part, join_path(path, inner))


def parts_of(gm: fx.GraphModule) -> dict[str, SaqGraphModule]:
    """The outermost graphs inside a graph, by path; none where the whole model was traced."""
    return {path: gm.get_submodule(path) for path in record_of(gm).parts}  # type: ignore[misc]


def held_by(node: fx.Node, paths: Iterable[str]) -> list[str]:
    """Those parts, of the given paths, that run when a node does."""
    if node.op == "call_function" and node.target is run_eagerly:
        return list(paths)
    if node.op != "call_module":
        return []
    return [path for path in paths if path == node.target or path.startswith(f"{node.target}.")]


def layers(gm: fx.GraphModule, path: str = "") -> Iterator[tuple[fx.Node, LayerAnnotation]]:
    """Every annotated layer of a prepared model, in the order of execution."""
    parts = parts_of(gm)
    if not (parts or path):
        yield from annotation.layer_nodes(gm.graph)
        return
    for node in gm.graph.nodes:
        layer = annotation.annotation_of(node)
        if layer is not None:
            yield node, layer.under(path) if path else layer
        if parts:
            for inner in held_by(node, list(parts)):
                yield from layers(parts.pop(inner), join_path(path, inner))


def attribute_at(module: nn.Module, path: str) -> Any:
    """What is found at a path from a module, None where there is nothing."""
    found: Any = module
    for name in path.split(".") if path else ():
        # Where modules keep them, first: their own look-up goes there last, after an error.
        children, parameters = getattr(found, "_modules", None), getattr(found, "_parameters", None)
        if children and name in children:
            found = children[name]
        else:
            found = parameters[name] if parameters and name in parameters else getattr(found, name, None)
    return found


def called_module(gm: nn.Module, node: fx.Node) -> Any:
    """The module that a `call_module` node calls; several times as fast as `get_submodule`."""
    return attribute_at(gm, str(node.target))


def unused_path(gm: nn.Module, path: str) -> str:
    """`path`, or `path_1`, `path_2`, … where an attribute of that name is taken."""
    parent_path, _, name = path.rpartition(".")
    parent = attribute_at(gm, parent_path)
    return path if parent is None else join_path(parent_path, unused_name(parent, name))


def unused_name(holder: Any, name: str) -> str:
    """`name`, or `name_1`, `name_2`, … where an attribute of that name is taken."""
    candidate, index = name, 0
    while _has(holder, candidate):
        index += 1
        candidate = f"{name}_{index}"
    return candidate


def _has(holder: Any, name: str) -> bool:
    """As `hasattr`, which takes several times as long where a module has no such attribute."""
    if not isinstance(holder, nn.Module):
        return hasattr(holder, name)
    held = vars(holder), holder._modules, holder._parameters, holder._buffers
    return any(name in each for each in held) or hasattr(type(holder), name)
