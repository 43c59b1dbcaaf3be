"""Whether a function multiplies tensors, told from its bytecode, before anything runs."""

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from saq_fx.operators import quantizable_names


def multiplies(function: Any, owner: type | None = None) -> bool:
    """Whether a function names an operation of the table or uses `@`, itself or in what it calls by name.

    Args:
        owner: the class whose methods it may call.
    """
    pending, seen, names = [function], set(), quantizable_names()
    while pending:
        current = pending.pop()
        if not isinstance(current, FunctionType) or current in seen or current.__module__.startswith("torch."):
            continue
        seen.add(current)
        for code in _codes(current.__code__):
            if names.intersection(code.co_names) or not _PRODUCTS.isdisjoint(_instructions(code)):
                return True
            pending += [current.__globals__.get(name) or getattr(owner, name, None) for name in code.co_names]
    return False


def asks_for_type(function: Any, name: str) -> bool:
    """Whether a function passes a built-in type on to what makes tensors or arrays (`dtype=int`, `astype(float)`)."""
    if not isinstance(function, FunctionType):
        return False
    for code in _codes(function.__code__):
        names_a_type = "astype" in code.co_names or any(
            "dtype" in each for each in code.co_consts if type(each) is tuple
        )
        if (
            names_a_type
            and name in code.co_names
            and any(_is_no_call_of(name, each) for each in dis.get_instructions(code))
        ):
            return True
    return False


def _is_no_call_of(name: str, instruction: dis.Instruction) -> bool:
    # The lowest bit says that a call follows.
    return instruction.opname == "LOAD_GLOBAL" and instruction.argval == name and not (instruction.arg or 0) & 1


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _instructions(code: CodeType) -> Iterator[tuple[int, int]]:
    """Operations and arguments; `dis` would make an object of each."""
    return zip(code.co_code[::2], code.co_code[1::2], strict=True)


_PRODUCTS = {
    (operation, argument)
    for product in ("a @ b", "a @= b")
    for operation, argument in _instructions(compile(product, "", "exec"))
    if dis.opname[operation] == "BINARY_OP"
}
