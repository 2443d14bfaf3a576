"""A run brought into memory: from its newest sentry, or from the start."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from wake2vec import __version__, base, identity, preflight, quantized, sentry
from wake2vec.config import Recipe
from wake2vec.environment import stack as installed_stack
from wake2vec.identity import Inputs
from wake2vec.metrics import MetricsLog
from wake2vec.model import WakeModel
from wake2vec.optimizer import Optimizer, make_optimizer
from wake2vec.plan import Plan, Work, read_work
from wake2vec.planner import choose_plan, free_memory, limit_memory, saved_plan
from wake2vec.reference import ReferenceWriter
from wake2vec.rows import start_rows
from wake2vec.rundir import RunDir, sweep
from wake2vec.sentry_writer import SentryWriter
from wake2vec.tokens import subword_pieces


class Console(Protocol):
    """What a run tells the person in front of it."""

    def say(self, message: str) -> None:
        """Show a message."""

    def step(self, step: int, max_steps: int, values: Mapping[str, float]) -> None:
        """Show how far the run is; `values` hold the newest of each metric."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show a line of the metrics log."""


@dataclass
class LossWindow:
    """The steps since the last log line; a sentry keeps sum and count, the seconds are this process's own."""

    loss_sum: float = 0.0
    num_steps: int = 0
    seconds: float = 0.0
    num_timed: int = 0

    def add(self, loss: float, seconds: float) -> None:
        """Count a step."""
        self.loss_sum += loss
        self.num_steps += 1
        self.seconds += seconds
        self.num_timed += 1


class _Window(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    loss_sum: float
    num_steps: Annotated[int, Field(ge=0)]


class _Counters(BaseModel):
    """What a resume takes from a sentry's header."""

    model_config = ConfigDict(strict=True)
    optimizer_step: Annotated[int, Field(ge=0)]
    plan: dict[str, Any]
    window: _Window


_PLAN = TypeAdapter(Plan)


@dataclass(frozen=True)
class Pending:
    """A step whose numbers the device may still be computing; `loss` and `norm` are 0-dim."""

    step: int
    rate: float
    loss: Tensor
    norm: Tensor


@dataclass
class Training:
    """A run in memory; `step` is the last finished one, and the rows are always those after it."""

    run: RunDir
    recipe: Recipe
    inputs: Inputs
    record: dict[str, Any]
    model: WakeModel
    optimizer: Optimizer
    plan: Plan
    work: Work
    metrics: MetricsLog
    writer: SentryWriter
    reference: ReferenceWriter
    console: Console
    step: int
    window: LossWindow
    pending: list[Pending] = field(default_factory=list)
    settled_at: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    beat_at: float = -math.inf

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that training changes, by its name in a sentry."""
        rows = {f"rows/{name}": parameter for name, parameter in self.model.rows.items()}
        return {**rows, **{f"optimizer/{name}": t for name, t in self.optimizer.state_tensors().items()}}

    def header(self) -> dict[str, Any]:
        """Return what a sentry keeps beside the tensors."""
        return {
            "format": sentry.FORMAT,
            "step": self.step,
            "identity": self.record["identity_sha256"],
            "stack": self.record["stack"]["name"],
            "optimizer_step": self.optimizer.step_count,  # less than `step` where rows were imported
            "plan": self.plan.as_json(),
            "window": {"loss_sum": self.window.loss_sum, "num_steps": self.window.num_steps},
            "best_step": self.metrics.best_step(),
            "val_loss_nats": self.metrics.value("val/loss_nats"),
        }


@dataclass(frozen=True)
class Options:
    """How a start differs from the usual one.

    Attributes:
        allow_stack_change: continue a run begun under other versions; None asks the environment.
        replan: make a new plan for the memory that is there in place of the run's own.
        gpu_memory_bytes: behave as on a card of this size.
        plan: what to follow whatever the planner says; for tests and benchmarks.
    """

    allow_stack_change: bool | None = None
    replan: bool = False
    gpu_memory_bytes: int | None = None
    plan: Plan | None = None


def resume(
    recipe: Recipe,
    run: RunDir,
    console: Console,
    record: dict[str, Any] | None,
    inputs: Inputs,
    options: Options,
) -> Training:
    """Load the base and the newest sentry, or the start rows; `record` is run.json, None for a new run."""
    stack = installed_stack()
    crosses = record is not None and identity.check_stack_change(record, stack, allow=options.allow_stack_change)
    device = _device(recipe, options)
    work = plan_work(recipe, inputs)
    preflight.check(recipe, run, inputs.base, work)
    free_bytes = free_memory(device)
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_newest, run, record, work, console.say) if record is not None else None
        frozen = _load_base(recipe, inputs, device, console.say)
        found = reading.result() if reading else None
    saved = saved_plan(found.header["plan"]) if found else None
    plan = options.plan or choose_plan(
        work,
        free_bytes,
        on_gpu=device.type == "cuda",
        fused=_fuses(recipe, device, console.say),
        saved=None if options.replan else saved,
    )
    if plan.table_on_host:
        frozen = base.with_table_on_host(frozen)
        torch.cuda.empty_cache()  # the table's old place
    if record is None:
        record = identity.begin_record(run, inputs, stack, __version__)
        _sweep(run)
    step = found.step if found else 0
    if crosses:
        identity.note(run, record, {"from_step": step, "stack_before": record["stack"]}, stack=stack.as_dict())
    rows = _named(found.tensors, "rows/") if found else _start(recipe, inputs, frozen)
    model = WakeModel(frozen, rows, plan)
    optimizer = make_optimizer(recipe.train.optimizer, model.rows, weight_decay=recipe.train.weight_decay)
    if found:
        optimizer.load_state_tensors(_named(found.tensors, "optimizer/"), found.header["optimizer_step"])
    metrics = MetricsLog(run, step, console.say)
    keeps = {"keep_last": recipe.run.keep_last, "keep_every": recipe.run.keep_every}
    writer = SentryWriter(run, **keeps, before=metrics.sync, say=console.say)
    writer.saved_step = step if found else None
    console.say(
        f"{'continuing after' if found else 'starting at'} step {step} of {recipe.train.max_steps}: "
        f"{inputs.num_new_tokens:,} new words, {len(inputs.train_blocks.ids_KT):,} blocks of {recipe.data.seq_len} "
        f"tokens, {plan}"
    )
    if found and plan != saved:
        note_plan(run, record, console.say, step=step, before=found.header["plan"], plan=plan)
    reference = ReferenceWriter(run, record["identity_sha256"], inputs, frozen, metrics.scribe.put)
    reference.write_base()
    window = LossWindow(**found.header["window"]) if found else LossWindow()
    training = Training(
        run, recipe, inputs, record, model, optimizer, plan, work, metrics, writer, reference, console, step, window
    )
    writer.reserve(training.tensors())
    return training


def _device(recipe: Recipe, options: Options) -> torch.device:
    device = base.default_device()
    if recipe.train.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if options.gpu_memory_bytes is not None and device.type == "cuda":
        limit_memory(device, options.gpu_memory_bytes)
    return device


def _fuses(recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> bool:
    """Say whether a run uses fused kernels, which Triton compiles a launcher for in C."""
    if device.type != "cuda" or recipe.train.exact:
        return False
    compiler = next(filter(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")), None)
    if compiler is None:
        say("no C compiler is there, so fused kernels are not used; install gcc and use --replan for a faster run")
    return compiler is not None


def _newest(run: RunDir, record: Mapping[str, Any], work: Work, say: Callable[[str], None]) -> sentry.Sentry | None:
    _sweep(run)
    return sentry.newest(run, record["identity_sha256"], say, lambda found: _check(found, work))


def _sweep(run: RunDir) -> None:
    for folder in (run.path, run.sentries, run.snapshots):
        sweep(folder)


def plan_work(recipe: Recipe, inputs: Inputs) -> Work:
    """Return what a run's plan is made for.

    Raises:
        WakeError: the base model is of a kind that cannot be trained on.
    """
    config = base.load_config(inputs.base)
    quantized.is_quantized(config, inputs.base.name, recipe.model.quantization)
    return read_work(
        config,
        name=inputs.base.name,
        quantization=recipe.model.quantization,
        compute_dtype=recipe.model.compute_dtype,
        num_new_tokens=inputs.num_new_tokens,
        batch_size=recipe.train.batch_size,
        seq_len=recipe.data.seq_len,
        optimizer=recipe.train.optimizer,
    )


def note_plan(
    run: RunDir,
    record: dict[str, Any],
    say: Callable[[str], None],
    *,
    step: int,
    before: Mapping[str, Any],
    plan: Plan,
) -> None:
    """Say that a run goes on under another plan, and put it on record: its numbers may differ in the last places."""
    say(f"memory is not what the plan was made for: going on after step {step} with {plan}")
    identity.note(run, record, {"from_step": step, "plan_before": dict(before), "plan": plan.as_json()})


def _load_base(recipe: Recipe, inputs: Inputs, device: torch.device, say: Callable[[str], None]) -> base.FrozenBase:
    say(f"loading {inputs.base.name} ({inputs.base.commit[:19]}) on {device.type}")
    return base.load(
        inputs.base,
        inputs.base_vocab_size,
        quantization=recipe.model.quantization,
        compute_dtype=recipe.model.compute_dtype,
        device=device,
        say=say,
    )


def _start(recipe: Recipe, inputs: Inputs, frozen: base.FrozenBase) -> dict[str, Tensor]:
    return start_rows(
        recipe.tokens.start,
        {"input": frozen.table_VD} if frozen.tied else {"input": frozen.table_VD, "head": frozen.head_VD},
        subword_pieces(inputs.base_tokenizer, inputs.words),
        start_radius=recipe.tokens.start_radius,
        seed=recipe.train.seed,
    )


def _check(found: sentry.Sentry, work: Work) -> None:
    """Refuse a sentry whose rows or counters cannot be this run's.

    Raises:
        DamagedError: naming the first thing that differs.
    """
    wanted = (work.num_new_tokens, work.hidden_size)
    rows = {name: tuple(tensor.shape) for name, tensor in _named(found.tensors, "rows/").items()}
    if rows != dict.fromkeys(["input"] if work.tied else ["input", "head"], wanted):
        raise sentry.DamagedError(f"its rows are {rows}, the run's are {wanted}")
    try:
        counters = _Counters.model_validate(found.header)
        if saved_plan(counters.plan) is not None:
            plan = _PLAN.validate_json(json.dumps(counters.plan), strict=True)
            if min(plan.micro_batch_size, plan.chunk_tokens, plan.kept_layers + 1) < 1:
                raise sentry.DamagedError(f"its plan is {counters.plan}")
    except ValidationError as error:
        problem = error.errors()[0]
        raise sentry.DamagedError(f"its {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
