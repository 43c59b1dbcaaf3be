"""Where in the user's code something happens."""

import contextlib
import functools
import os
import sys
import traceback
from types import FrameType

import torch

_LIBRARIES = (os.path.join(torch.__path__[0], ""), os.path.join(os.path.dirname(__file__), ""))
_WRAPPERS = (contextlib.__file__, functools.__file__)


def is_library(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's or this library's."""
    return frame.f_code.co_filename.startswith(_LIBRARIES)


def place_and_cause(error: BaseException) -> str:
    """The last line of the user's code on the way to an error, and the first line of its message."""
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return f"{_source_line(error)}: {cause}"


def line_of_user() -> str:
    """The file and line of the code that is running, past torch's and the tracer's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (is_library(frame) or frame.f_code.co_filename in _WRAPPERS):
        frame = frame.f_back
    return "no source line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _source_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, *_WRAPPERS))]
    if not own:
        return "no source line"
    return f"{own[-1].filename}:{own[-1].lineno} `{own[-1].line}`"
