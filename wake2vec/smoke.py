"""`wake2vec doctor --gpu`: everything a run does, in small, on the card itself; a user's first minute on a new one.

A tiny base is made as for the demo, and trained in NF4 with deterministic kernels twice: once through, and once with a
SIGTERM in the middle. Nothing is written outside a temporary folder.

Shapes: S side of a square matrix.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from wake2vec import demo, sentry
from wake2vec.config import Recipe
from wake2vec.doctor import Check
from wake2vec.errors import Stopped, WakeError
from wake2vec.machine import MENDS
from wake2vec.metrics import Record
from wake2vec.packed import Linear4bit, dequantize_4bit, quantize_4bit
from wake2vec.rundir import RunDir
from wake2vec.train import train

Answer = tuple[Literal["ok", "warn"], str]

_PRETRAINING = replace(
    demo.PRETRAINING, vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, steps=4, seq_len=32
)
_NUM_STEPS, _STOPPED_AFTER = 12, 7
_TROUBLE = (WakeError, RuntimeError, OSError, ImportError, subprocess.SubprocessError)
"""What a card, its driver, a library or the C compiler raises when it does not work."""


def checks(device: torch.device, compiled: Callable[..., Any] = torch.compile) -> Iterator[Check]:
    """Yield every check on a device; `compiled` stands for torch.compile in tests."""
    if device.type == "cuda" and not torch.cuda.is_available():
        yield Check("fail", "GPU", f"torch sees none to try; give the container one ({MENDS})")
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product of matrices
    driver = f"update the host's driver, or use another card ({MENDS})"
    with _workshop() as folder:
        yield _try("matmul", lambda: check_matmul(device), driver)
        yield _try("NF4", lambda: check_nf4(device), "install the locked bitsandbytes")
        yield _try("training", lambda: check_training(folder), "report this with the lines above")
        yield _try("resume", lambda: check_resume(folder), "report this: exact = true does not hold on this card")
        needs = "install gcc, the C library's and Python's headers (Debian: gcc libc6-dev python3-dev)"
        yield _try("compile", lambda: check_compile(device, compiled), needs)


def _try(what: str, check: Callable[[], Answer], mend: str) -> Check:
    started = time.perf_counter()
    try:
        state, found = check()
    except _TROUBLE as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Check("fail", what, f"{reason}; {mend}")
    return Check(state, what, f"{found} ({time.perf_counter() - started:.1f} s)")


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """Give a folder that is gone afterwards, with wake2vec's cache in it; leave torch as it was."""
    cache, exact = os.environ.get("WAKE2VEC_CACHE"), torch.are_deterministic_algorithms_enabled()
    with tempfile.TemporaryDirectory(prefix="wake2vec-doctor-") as folder:
        os.environ["WAKE2VEC_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            torch.use_deterministic_algorithms(exact)
            del os.environ["WAKE2VEC_CACHE"]
            if cache is not None:
                os.environ["WAKE2VEC_CACHE"] = cache


def check_matmul(device: torch.device) -> Answer:
    """Multiply matrices in both 16-bit types, and say which is fast: a T4 has no native bfloat16."""
    seconds = {dtype: _time_matmul(device, dtype) for dtype in (torch.float16, torch.bfloat16)}
    half, brain = seconds.values()
    size = _matrix_size(device)
    found = f"{size} x {size}: bfloat16 {1e3 * brain:.3g} ms, float16 {1e3 * half:.3g} ms"
    if device.type == "cuda" and brain > 2 * half:
        return "warn", f'{found}; bfloat16 is slow here, new runs are faster with model.compute_dtype = "float16"'
    return "ok", found


def _matrix_size(device: torch.device) -> int:
    return 4096 if device.type == "cuda" else 128


def _time_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of one product, checked against float64 on the host."""
    left_SS, right_SS = (_random(_matrix_size(device), seed).to(device, dtype) for seed in (1, 2))
    found_SS = left_SS @ right_SS
    expected = left_SS[:8].double().cpu() @ right_SS.double().cpu()
    _check_close(f"{dtype} matmul".removeprefix("torch."), found_SS[:8], expected, 0.02)
    return _seconds(device, lambda: left_SS @ right_SS)


def _random(size: int, seed: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def _check_close(what: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Compare, relative to the largest expected value; NaN is never close."""
    difference = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
    if not difference <= bound:
        raise WakeError(f"{what}: off by {difference:.2g} of the largest value, at most {bound:.2g} is rounding")


def _seconds(device: torch.device, work: Callable[[], object], times: int = 10) -> float:
    """Return the seconds of one call, over several."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_nf4(device: torch.device) -> Answer:
    """Quantise a matrix as a base's are, and multiply by it."""
    size = _matrix_size(device)
    weight_SS = _random(size, 3).to(device, torch.bfloat16)
    packed, state = quantize_4bit(weight_SS, quant_type="nf4", compress_statistics=True)
    whole_SS = dequantize_4bit(packed, state)
    error = float((whole_SS - weight_SS).float().abs().mean())
    if not 0.03 < error < 0.12:  # of normal numbers in blocks of 64, 0.07; rounding of another kind is off by far more
        raise WakeError(f"NF4: its mean error on normal numbers is {error:.3g}, it should be near 0.07")
    linear = Linear4bit(size, size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    linear.weight = type(linear.weight).from_prequantized(
        packed, state.as_dict(packed=True), device=device, module=linear
    )
    inputs = _random(size, 4)[:64].to(device, torch.bfloat16)
    expected = functional.linear(inputs.double().cpu(), whole_SS.double().cpu())
    _check_close("NF4 matmul", linear(inputs), expected, 0.02)
    return "ok", f"{size} x {size}: mean error {error:.3f}, {1e3 * _seconds(device, lambda: linear(inputs)):.3g} ms"


class _Quiet:
    """A console that shows nothing, and stops the run as `docker stop` would after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop_after = stop_after

    def say(self, message: str) -> None:
        """Show nothing."""

    def step(self, step: int, _max_steps: int, _values: Mapping[str, float]) -> None:
        """Stop where that is wanted."""
        if step == self._stop_after:
            signal.raise_signal(signal.SIGTERM)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show nothing."""


def check_training(folder: Path) -> Answer:
    """Make a tiny base, load it in NF4, train it to the end, and see the loss fall."""
    demo.prepare(folder / "demo", pretraining=_PRETRAINING)
    losses = _losses(train(_recipe(folder), RunDir(folder / "through"), _Quiet()))
    if not losses[-1] < losses[0] - 0.01:
        raise WakeError(f"training: the held-out loss goes from {losses[0]:.4f} to {losses[-1]:.4f}, it should fall")
    return "ok", f"{_NUM_STEPS} steps in NF4, held-out loss {losses[0]:.3f} to {losses[-1]:.3f} nats"


def _losses(records: list[Record]) -> list[float]:
    return [float(record["val/loss_nats"]) for record in records if "val/loss_nats" in record]


def _recipe(folder: Path) -> Recipe:
    settings = {
        "model": {"base": str(folder / "demo" / "base"), "quantization": "nf4", "compute_dtype": "bfloat16"},
        "tokens": {"lexicon": str(folder / "demo" / "lexicon.txt")},
        "data": {"text": str(folder / "demo" / "text.txt"), "seq_len": 64},
        "train": {
            "batch_size": 8,
            "max_steps": _NUM_STEPS,
            "warmup_steps": 1,
            "learning_rate": 0.05,
            "val_fraction": 0.02,
            "exact": True,
        },
        "run": {"log_every": 1, "eval_every": _NUM_STEPS, "sentry_every": 100, "keep_every": 0},
    }
    return Recipe.model_validate(settings)


def check_resume(folder: Path) -> Answer:
    """Stop a second run in the middle, start it again, and compare its end with the first's, bit by bit."""
    recipe, run = _recipe(folder), RunDir(folder / "stopped")
    if not RunDir(folder / "through").sentry(_NUM_STEPS).exists():
        raise WakeError("resume: there is no whole run to compare with")
    try:
        train(recipe, run, _Quiet(stop_after=_STOPPED_AFTER))
    except Stopped:
        if not run.sentry(_STOPPED_AFTER).exists():
            raise
    train(recipe, run, _Quiet())
    expected, found = (sentry.read(RunDir(folder / name).sentry(_NUM_STEPS)).tensors for name in ("through", "stopped"))
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    if differing:
        worst = max(float((expected[name] - found[name]).abs().max()) for name in differing)
        raise WakeError(f"resume: {', '.join(differing)} end up to {worst:.2g} apart from an uninterrupted run's")
    return "ok", f"stopped after step {_STOPPED_AFTER}, started again: rows and optimizer the same to the bit"


def check_compile(device: torch.device, compiled: Callable[..., Any]) -> Answer:
    """Compile a small function, which takes a C compiler at first use."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    gate, up = (_random(256, seed).to(device) for seed in (5, 6))
    found = compiled(swiglu, fullgraph=True)(gate, up)
    _check_close("compiled function", found, swiglu(gate.double().cpu(), up.double().cpu()), 1e-5)
    return "ok", "a compiled function gives what the plain one gives"
