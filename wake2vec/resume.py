"""A run brought into memory: from its newest sentry, or from the start."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from wake2vec import __version__, base, identity, preflight, sentry
from wake2vec.config import Recipe
from wake2vec.environment import stack as installed_stack
from wake2vec.identity import Inputs
from wake2vec.metrics import MetricsLog
from wake2vec.model import WakeModel
from wake2vec.optimizer import Optimizer, make_optimizer
from wake2vec.plan import Plan, free_memory, make_plan
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
    metrics: MetricsLog
    writer: SentryWriter
    reference: ReferenceWriter
    console: Console
    step: int
    window: LossWindow
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


def resume(
    recipe: Recipe,
    run: RunDir,
    console: Console,
    record: dict[str, Any] | None,
    inputs: Inputs,
    *,
    plan: Plan | None,
    allow_stack_change: bool | None,
) -> Training:
    """Load the base and the newest sentry, or the start rows; `record` is run.json, None for a new run."""
    stack = installed_stack()
    crosses = record is not None and identity.check_stack_change(record, stack, allow=allow_stack_change)
    if recipe.train.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    preflight.check(recipe, run, inputs.base, inputs.num_new_tokens)
    frozen = _load_base(recipe, inputs, console.say)
    if record is None:
        record = identity.begin_record(run, inputs, stack, __version__)
    for folder in (run.path, run.sentries, run.snapshots):
        sweep(folder)
    found = sentry.newest(run, record["identity_sha256"], console.say)
    step = found.step if found else 0
    if crosses:
        identity.note(run, record, {"from_step": step, "stack_before": record["stack"]}, stack=stack.as_dict())
    plan = Plan(**found.header["plan"]) if found else plan or _plan(recipe, inputs, frozen)
    rows = _named(found.tensors, "rows/") if found else _start(recipe, inputs, frozen)
    model = WakeModel(frozen, rows, chunk_tokens=plan.chunk_tokens, checkpointing=plan.checkpointing)
    optimizer = make_optimizer(recipe.train.optimizer, model.rows, weight_decay=recipe.train.weight_decay)
    if found:
        optimizer.load_state_tensors(_named(found.tensors, "optimizer/"), found.header["optimizer_step"])
    metrics = MetricsLog(run, step)
    writer = SentryWriter(
        run,
        keep_last=recipe.run.keep_last,
        keep_every=recipe.run.keep_every,
        before=metrics.sync,
        say=console.say,
    )
    writer.saved_step = step if found else None
    console.say(
        f"{'continuing after' if found else 'starting at'} step {step} of {recipe.train.max_steps}: "
        f"{inputs.num_new_tokens:,} new words, {len(inputs.train_blocks.ids_KT):,} blocks of {recipe.data.seq_len} "
        f"tokens, micro-batch {plan.micro_batch_size} of {recipe.train.batch_size}"
    )
    reference = ReferenceWriter(run, record["identity_sha256"], inputs, frozen)
    reference.write_base()
    window = LossWindow(**found.header["window"]) if found else LossWindow()
    return Training(
        run,
        recipe,
        inputs,
        record,
        model,
        optimizer,
        plan,
        metrics,
        writer,
        reference,
        console,
        step=step,
        window=window,
    )


def _load_base(recipe: Recipe, inputs: Inputs, say: Callable[[str], None]) -> base.FrozenBase:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"loading {inputs.base.name} ({inputs.base.commit[:19]}) on {device.type}")
    return base.load(
        inputs.base,
        inputs.base_vocab_size,
        quantization=recipe.model.quantization,
        compute_dtype=recipe.model.compute_dtype,
        device=device,
    )


def _start(recipe: Recipe, inputs: Inputs, frozen: base.FrozenBase) -> dict[str, Tensor]:
    return start_rows(
        recipe.tokens.start,
        {"input": frozen.table_VD} if frozen.tied else {"input": frozen.table_VD, "head": frozen.head_VD},
        subword_pieces(inputs.base_tokenizer, inputs.words.words),
        start_radius=recipe.tokens.start_radius,
        seed=recipe.train.seed,
    )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plan(recipe: Recipe, inputs: Inputs, frozen: base.FrozenBase) -> Plan:
    row_bytes = 4 * inputs.num_new_tokens * frozen.table_VD.shape[1]
    return make_plan(
        frozen.body.config,
        batch_size=recipe.train.batch_size,
        seq_len=recipe.data.seq_len,
        vocab_size=inputs.base_vocab_size + inputs.num_new_tokens,
        dtype_bytes=frozen.table_VD.element_size(),
        free_bytes=max(0, free_memory(frozen.device) - row_bytes * (3 if frozen.tied else 5)),
    )
