"""Measure what saving costs the training loop: the rows of Qwen2.5-14B and Adafactor's state, on a card or a CPU.

    python bench/sentry.py --folder FOLDER                       full size: 1.8 GB a save, steps of 0.3 s
    python bench/sentry.py --rows 2000 --hidden 512 --saves 3    small: for a CPU

A step is matrix products of 2,048 tokens by D by `--columns`, as many as bring it to `--step-s`; then the loss is read,
and the real optimizer updates the real rows. Each product is a launch, and a step of the model has thousands: fewer
columns show whether the writer's thread gets into Python's way. Saves go through the package's own writer: copied
beside the next step, hashed, written, synced and read back by its thread. What a save costs the loop is the time by
which all steps from its start to its end took longer than the steps around it. FOLDER should lie on the disk where
runs will; it is left empty.

Prints JSON lines. Shapes: N new words, D hidden size, M tokens a step.
"""

import argparse
import functools
import inspect
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wake2vec import sentry
from wake2vec.config import RunSection, load_recipe
from wake2vec.optimizer import Optimizer, make_optimizer
from wake2vec.rundir import RunDir
from wake2vec.sentry_writer import SentryWriter

TOKENS_A_STEP = 2048


class Loop:
    """The part of a training loop that a save can disturb."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.device = device = torch.device(options.device)
        self.step = 0
        self.rows = _rows_with_gradients(options.rows, options.hidden, device)
        self.optimizer: Optimizer = make_optimizer("adafactor", self.rows)
        recipe = load_recipe("qwen14b")[1].run
        self.writer = SentryWriter(
            RunDir(folder), keep_last=recipe.keep_last, keep_every=0, before=lambda: None, say=_fail
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        num_tokens = TOKENS_A_STEP if device.type == "cuda" else 128
        self.left_MD = torch.randn(num_tokens, options.hidden, device=device, dtype=dtype)
        self.right = torch.randn(options.hidden, options.columns, device=device, dtype=dtype)
        self.product = self.left_MD @ self.right
        self.num_products = self._count_products(options.step_s)

    def _count_products(self, step_s: float) -> int:
        """Return how many products bring a step to `step_s`."""
        self.num_products = 0
        update_s = min(self._timed(self.train_step) for _ in range(5))
        count = round((step_s - update_s) / self._seconds_a_product(step_s / 4))
        if count < 1:
            raise SystemExit(f"--step-s {step_s}: the update alone takes {update_s:.3f} s; ask for longer steps")
        return count

    def _seconds_a_product(self, at_least_s: float) -> float:
        """Time ever more products, until they take long enough to trust the clock."""
        count, seconds = 8, 0.0
        while seconds < at_least_s:
            count *= 2
            seconds = self._timed(functools.partial(self._multiply, count))
        return seconds / count

    def _multiply(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self.left_MD, self.right, out=self.product)

    def _timed(self, action: Callable[[], object]) -> float:
        _synchronize(self.device)
        started = time.perf_counter()
        action()
        _synchronize(self.device)
        return time.perf_counter() - started

    def train_step(self) -> None:
        """Work as `train._loop` does: the loss is read before the update, nothing waits after it."""
        self.step += 1
        self._multiply(self.num_products)
        float(self.product[0, 0])
        self.writer.wait_for_copy()
        self.optimizer.step(1e-5)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a sentry holds."""
        rows = {f"rows/{name}": parameter for name, parameter in self.rows.items()}
        return {**rows, **{f"optimizer/{name}": t for name, t in self.optimizer.state_tensors().items()}}

    def save(self) -> None:
        """Start a save of the rows as they are."""
        header = {"format": sentry.FORMAT, "step": self.step, "best_step": None}
        assert self.writer.save(self.tensors(), header), "the last save has ended"


def _fail(problem: str) -> None:
    raise SystemExit(problem)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rows_with_gradients(num_rows: int, hidden_size: int, device: torch.device) -> dict[str, nn.Parameter]:
    """Return input rows with a sparse gradient and head rows with a dense one, as the loss leaves them."""
    generator = torch.Generator(device).manual_seed(0)
    rows = {
        name: nn.Parameter(torch.randn(num_rows, hidden_size, device=device, generator=generator) * 0.02)
        for name in ("input", "head")
    }
    looked_up_M = torch.randint(num_rows, (TOKENS_A_STEP,), device=device, generator=generator)
    values_MD = torch.randn(TOKENS_A_STEP, hidden_size, device=device, generator=generator)
    rows["input"].grad = torch.sparse_coo_tensor(looked_up_M[None], values_MD, (num_rows, hidden_size))
    rows["head"].grad = torch.randn(num_rows, hidden_size, device=device, generator=generator)
    return rows


def time_alone(loop: Loop) -> dict[str, float]:
    """Time a save that no step runs beside."""
    started = time.perf_counter()
    loop.save()
    returned = time.perf_counter()
    loop.writer.wait_for_copy()
    _synchronize(loop.device)
    copied = time.perf_counter()
    loop.writer.wait()
    ended = time.perf_counter()
    size = loop.writer.run.sentry(loop.step).stat().st_size
    return {
        "call_s": returned - started,
        "copied_s": copied - started,
        "save_s": ended - started,
        "mb": size / 1e6,
        "mb_per_s": size / 1e6 / (ended - started),
    }


def time_beside(loop: Loop, num_quiet: int) -> dict[str, Any]:
    """Time a save with the steps beside it, and as many steps without one before it as after it."""
    _time_steps(loop, lambda _: False)  # the last save's, or one that waits for no update
    before = _time_steps(loop, lambda done: done < num_quiet)
    started = time.perf_counter()
    loop.save()
    call_s = time.perf_counter() - started
    beside = _time_steps(loop, lambda _: loop.writer.busy)
    beside[0] += call_s
    loop.writer.wait()
    quiet = before + _time_steps(loop, lambda done: done < num_quiet)
    quiet_s = statistics.mean(quiet)
    return {
        "quiet_step_s": _spread(quiet),
        "step_beside_s": _spread(beside),
        "steps_beside": len(beside),
        "call_s": call_s,
        "first_step_extra_s": beside[0] - quiet_s,
        "extra_s": sum(beside) - len(beside) * quiet_s,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _time_steps(loop: Loop, more: Callable[[int], bool]) -> list[float]:
    """Run steps, at least one; the update of one is timed with the next, as the loop does not wait for it."""
    seconds: list[float] = []
    while not seconds or more(len(seconds)):
        started = time.perf_counter()
        loop.train_step()
        seconds.append(time.perf_counter() - started)
    return seconds


def gap_between_saves(run: RunSection, step_s: float) -> float:
    """Return the seconds from one save to the next at a recipe's cadence."""
    return min(max(run.sentry_every * step_s, run.sentry_min_gap_s), run.sentry_max_gap_s)


def summarise(saves: list[dict[str, Any]], run: RunSection) -> dict[str, Any]:
    """Return what a save costs, over all saves."""
    step_s = statistics.mean(save["quiet_step_s"]["mean"] for save in saves)
    gap_s = gap_between_saves(run, step_s)
    costs = {
        "call_share_of_a_step": [save["call_s"] / step_s for save in saves],
        "first_step_share_of_a_step": [save["first_step_extra_s"] / step_s for save in saves],
        "blocked_share_of_a_step": [save["extra_s"] / step_s for save in saves],
        "amortised_share": [save["extra_s"] / gap_s for save in saves],
    }
    spreads = {name: _spread(values) for name, values in costs.items()}
    return {"step_s": step_s, "gap_between_saves_s": gap_s, **spreads}


def _print(record: dict[str, Any]) -> None:
    print(json.dumps(record, default=float), flush=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Measure buffers, saves alone and saves beside steps."""
    loop = Loop(folder, options)
    size = sum(tensor.numel() * tensor.element_size() for tensor in loop.tensors().values())
    _print({"mb": size / 1e6, "products_a_step": loop.num_products})
    started = time.perf_counter()
    loop.writer.reserve(loop.tensors())
    _print({"reserve_s": time.perf_counter() - started})
    for name in ("first", "second"):
        loop.train_step()
        _print({"alone": name, **time_alone(loop)})
    saves = []
    for _ in range(options.saves):
        saves.append(time_beside(loop, options.quiet_steps))
        _print(saves[-1])
    _print(summarise(saves, load_recipe("qwen14b")[1].run))


def main() -> None:
    """Run at the size asked for."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=44_223)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--step-s", type=float, default=0.3)
    parser.add_argument("--columns", type=int, default=640, help="of a product; fewer: more launches a step")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--quiet-steps", type=int, default=20, help="steps before a save, and after it")
    parser.add_argument("--folder", type=Path, help="where to save; default: the temporary folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    _print({"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())})
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
