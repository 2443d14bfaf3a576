"""What is used of bitsandbytes, imported without two detours that cost seconds of every start.

At its import bitsandbytes compiles operators of its optimizers, which brings in all of torch's compiler, and runs pip
to look for a package of Intel's. It falls back where torch cannot compile, and where there is no pip.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def _no_detours() -> Iterator[None]:
    def cannot_compile(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not needed")

    compile_, path = torch.compile, os.environ.get("PATH")
    torch.compile, os.environ["PATH"] = cannot_compile, ""
    try:
        yield
    finally:
        torch.compile = compile_
        os.environ.pop("PATH")
        if path is not None:
            os.environ["PATH"] = path


with _no_detours():
    from bitsandbytes.backends.cuda.ops import _dequantize_4bit_impl as dequantize_into
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit
    from bitsandbytes.nn import Linear4bit

__all__ = ["Linear4bit", "dequantize_4bit", "dequantize_blockwise", "dequantize_into", "quantize_4bit"]
