"""The training of a run, to its end.

    for step in (last saved step + 1) .. max_steps:
        forward and backward over the micro-batches of batch(step)      a signal drops this part
        clip, update the rows in place                                  a signal waits for this part
        log, evaluate, save: each where it is due

batch(step) and learning_rate(step) are pure functions, so rows, optimizer state and the step are all a resume needs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from wake2vec import identity
from wake2vec.config import Recipe, RunSection
from wake2vec.data import PAD, Blocks, batch_indices, epoch_order
from wake2vec.errors import Stopped, WakeError
from wake2vec.evaluate import TokenLosses, evaluate
from wake2vec.metrics import Record, mend_loss_table, read_records
from wake2vec.optimizer import clip_scale, grad_norm
from wake2vec.overlay import to_device
from wake2vec.plan import estimate
from wake2vec.planner import leaner_plan
from wake2vec.reference import WordLosses
from wake2vec.resume import Console, LossWindow, Options, Pending, Training, note_plan, resume
from wake2vec.rundir import RunDir, hold, write_json
from wake2vec.schedule import learning_rate_at
from wake2vec.signals import StopSignal

_HEARTBEAT_GAP_S = 5.0
_SNAPSHOT_WAIT_S = 30.0
"""A snapshot waits so long for the save before it; on a volume slower than that it is skipped like any other."""
_SETTLE_GAP_S = 1.0
_USUAL = Options()
T = TypeVar("T")


def train(recipe: Recipe, run: RunDir, console: Console, options: Options = _USUAL) -> list[Record]:
    """Start or continue a run and see it to its end; return its metrics.

    Raises:
        WakeError: the user can mend it.
        Stopped: a signal came; everything is saved.
    """
    with StopSignal() as stop, hold(run):
        with stop.interruptible():
            record = identity.read_run(run)
            if record is not None:
                identity.check_recipe(run, record, recipe)
                if is_done(run, recipe):
                    console.say(f"run {run.name} is done: {recipe.train.max_steps} steps")
                    return mend_loss_table(run)
            commit = record["identity"]["base"]["commit"] if record is not None else None
            inputs = identity.read_inputs(recipe, commit, console.say)
            if record is not None:
                identity.check_inputs(run, record, inputs)
            training = resume(recipe, run, console, record, inputs, options)
        try:
            _loop(training, stop)
        except Stopped:
            _settle(training)
            if training.writer.wait() != training.step:
                training.writer.save_now(training.tensors(), training.header())
            console.say(f"stopped after step {training.step}, saved")
            raise
        finally:
            training.writer.wait()
            training.metrics.close()
        return training.metrics.records


def is_done(run: RunDir, recipe: Recipe) -> bool:
    """Say whether a run has nothing left to do."""
    records = read_records(run.metrics)
    finished = any("control/bits_per_char" in r and r["step"] == recipe.train.max_steps for r in records)
    return finished and run.sentry(recipe.train.max_steps).exists()


@dataclass(frozen=True)
class Gradient:
    """What a step's forward and backward leave beside the rows' gradients, which are those of the summed loss.

    Attributes:
        loss: mean nats a token over the step, 0-dim; `norm`: of that mean's gradient.
    """

    loss: Tensor
    norm: Tensor
    num_scored: int


def _loop(training: Training, stop: StopSignal) -> None:
    """Run the steps that are left; on `Stopped` the rows are those of `training.step`."""
    train = training.recipe.train
    with stop.interruptible():
        _try_plan(training)
    _after_step(training, stop)
    training.settled_at = time.monotonic()
    for step in range(training.step + 1, train.max_steps + 1):
        with stop.interruptible():
            gradient = _within_memory(training, lambda: _gradient(training, step))  # noqa: B023 - called at once
        training.writer.wait_for_copy()
        rate = learning_rate_at(
            step, learning_rate=train.learning_rate, warmup_steps=train.warmup_steps, max_steps=train.max_steps
        )
        _update(training, gradient, rate)
        training.step = step
        training.pending.append(Pending(step, rate, gradient.loss, gradient.norm))
        if _is_due(training) or stop.received:
            _settle(training)
            _after_step(training, stop)
            training.settled_at = time.monotonic()
            stop.check()
    _finish(training, stop)


def _is_due(training: Training) -> bool:
    """Say whether a step's numbers are wanted now; a GPU is not kept waiting for them after every step."""
    run, step = training.recipe.run, training.step
    if training.model.base.device.type != "cuda" or step == training.recipe.train.max_steps:
        return True
    intervals = [every for every in (run.log_every, run.eval_every, run.snapshot_every, run.keep_every) if every]
    return any(step % every == 0 for every in intervals) or time.monotonic() - training.settled_at >= _SETTLE_GAP_S


def _settle(training: Training) -> None:
    """Wait for the steps under way and take their numbers; nothing is saved before this has found them finite."""
    steps, training.pending = training.pending, []
    if not steps:
        return
    numbers = torch.stack([torch.stack([p.loss, p.norm.to(p.loss)]) for p in steps]).tolist()
    seconds = (time.monotonic() - training.settled_at) / len(steps)
    for pending, (loss, norm) in zip(steps, numbers, strict=True):
        _check_finite(training, pending.step, loss, norm)
        training.window.add(loss, seconds)
        _log(training, pending, norm)


def _update(training: Training, gradient: Gradient, rate: float) -> None:
    """Update the rows in place."""
    scale = clip_scale(gradient.norm, training.recipe.train.max_grad_norm) / gradient.num_scored
    try:
        training.optimizer.step(rate, scale)
    except torch.OutOfMemoryError as error:
        raise WakeError(
            f"out of memory in the update of step {training.step + 1} ({str(error).splitlines()[0]}); free the card of "
            f"other programs; {training.writer.last_save()}; then give the same command again"
        ) from None


def _check_finite(training: Training, step: int, loss: float, norm: float) -> None:
    """Stop before rows that hold NaN or Inf could be saved."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise WakeError(
        f"step {step}: loss {loss}, gradient norm {norm}, blocks {_indices(training, step)}; "
        f"{training.writer.last_save()}; look at these blocks, or begin another run with a lower train.learning_rate"
    )


def _try_plan(training: Training) -> None:
    """Compute a micro-batch for nothing: memory that is short shows before the run begins, and not in it."""
    if training.model.base.device.type == "cuda" and training.step < training.recipe.train.max_steps:
        _within_memory(training, lambda: _sums(training, training.step + 1, training.plan.micro_batch_size))


def _within_memory(training: Training, compute: Callable[[], T]) -> T:
    """Return what `compute` gives; where the device's memory runs out, take a leaner plan and compute it again.

    `compute` may not have changed anything that lasts.
    """
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError:
            pass  # left before going on: the exception holds the tensors of the calls that it came through
        _step_down(training)


def _step_down(training: Training) -> None:
    """Take a leaner plan after the device's memory ran out.

    Raises:
        WakeError: there is none.
    """
    plan, work = training.plan, training.work
    before = estimate(plan, work).peak
    leaner = leaner_plan(plan, work, host_is_apart=training.model.base.device.type == "cuda")
    if leaner is None:
        raise WakeError(
            f"out of memory after step {training.step}: even the leanest plan ({before / 2**30:.1f} GiB by the "
            f"estimate) did not fit; free the card of other programs (nvidia-smi shows them) or use a larger one; "
            f"{training.writer.last_save()}; then give the same command again"
        )
    training.model.zero_grad()
    training.model.follow(leaner)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    training.plan = leaner
    note_plan(
        training.run, training.record, training.console.say, step=training.step, before=plan.as_json(), plan=leaner
    )


def _gradient(training: Training, step: int) -> Gradient:
    """Fill the rows' gradients with those of a step; nothing waits for the device."""
    losses, num_scored = _sums(training, step, training.recipe.train.batch_size)
    norm = grad_norm(training.model.rows.values()) / num_scored
    return Gradient(torch.stack(losses).sum() / num_scored, norm, num_scored)


def _sums(training: Training, step: int, num_blocks: int) -> tuple[list[Tensor], int]:
    """Fill the rows' gradients from a step's first blocks; return the micro-batches' losses and the tokens scored."""
    model = training.model
    blocks_BT = training.inputs.train_blocks.ids_KT[_indices(training, step)[:num_blocks]]
    num_scored = int((blocks_BT[:, 1:] != PAD).sum())
    blocks_BT = to_device(blocks_BT, model.ids_device)
    model.zero_grad()
    return [model.backward(micro) for micro in blocks_BT.split(training.plan.micro_batch_size)], num_scored


def _indices(training: Training, step: int) -> list[int]:
    train = training.recipe.train
    return batch_indices(
        step, batch_size=train.batch_size, num_blocks=len(training.inputs.train_blocks.ids_KT), seed=train.seed
    )


def _after_step(training: Training, stop: StopSignal) -> None:
    """Evaluate and save where it is due: also after a step taken up again, where a signal may have come between."""
    run, train, step = training.recipe.run, training.recipe.train, training.step
    evaluation_due = step % run.eval_every == 0 or step == train.max_steps
    unscored = evaluation_due and not training.metrics.has(step, "val/loss_nats")
    if unscored:
        with stop.interruptible():
            _evaluate(training)
    snapshot = run.snapshot_every > 0 and step > 0 and step % run.snapshot_every == 0
    if training.writer.saved_step != step or unscored:  # one saved by a stop does not know its loss yet
        kept = run.keep_every > 0 and step % run.keep_every == 0
        urgent = snapshot or kept or step in (0, train.max_steps, training.metrics.best_step())
        _save(training, urgent=urgent, snapshot=snapshot)
    _beat(training)


def _evaluate(training: Training) -> None:
    """Put the losses on held-out text on record; at the start the base model's too: the number a run must beat."""
    words = WordLosses(training.inputs.num_new_tokens, training.inputs.base_vocab_size)
    values = _losses(training, training.model.token_losses, training.inputs.val_blocks, words)
    if not math.isfinite(values["val/loss_nats"]):
        raise WakeError(
            f"step {training.step}: loss {values['val/loss_nats']} on the held-out text; "
            f"{training.writer.last_save()}; begin another run with a lower train.learning_rate"
        )
    if training.step == 0:
        base = _losses(training, training.model.base_token_losses, training.inputs.base_val_blocks)
        values["base/bits_per_char"] = base["val/bits_per_char"]
    last = training.step == training.recipe.train.max_steps
    rows_ND = training.model.rows["input"]
    _within_memory(training, lambda: training.reference.after_evaluation(training.step, words, rows_ND, last=last))
    _record(training, values)


def _losses(
    training: Training, token_losses: TokenLosses, blocks: Blocks, words: WordLosses | None = None
) -> dict[str, float]:
    def scored() -> dict[str, float]:
        if words is not None:
            words.clear()  # of a try that ran out of memory
        return evaluate(
            token_losses,
            blocks,
            first_new_id=training.inputs.base_vocab_size,
            batch_size=training.plan.micro_batch_size,
            device=training.model.base.device,
            ids_device=training.model.ids_device,
            each=words.add if words is not None else None,
        )

    return _within_memory(training, scored)


def _record(training: Training, values: dict[str, float]) -> None:
    training.metrics.append(training.step, values)
    training.metrics.write_loss_table()
    training.console.log(training.step, values)


def _log(training: Training, pending: Pending, norm: float) -> None:
    """Show a step and, where a line is due, put the mean over the steps since the last one on record."""
    train, window, metrics = training.recipe.train, training.window, training.metrics
    step_s = window.seconds / window.num_timed
    values = {
        "train/loss_nats": window.loss_sum / window.num_steps,
        "optim/learning_rate": pending.rate,
        "optim/grad_norm": norm,
        "time/step_s": step_s,
        "throughput/tokens_per_s": train.batch_size * training.recipe.data.seq_len / step_s,
        "memory/peak_gib": training.model.peak_memory_bytes() / 2**30,
    }
    val = {key: value for key in ("val/loss_nats", "val/bits_per_char") if (value := metrics.value(key)) is not None}
    training.console.step(pending.step, train.max_steps, {**values, **val})
    if pending.step % training.recipe.run.log_every == 0 or pending.step == train.max_steps:
        metrics.append(pending.step, values)
        training.console.log(pending.step, values)
        training.window = LossWindow()


def _save(training: Training, *, urgent: bool, snapshot: bool) -> None:
    """Start a save where one is due; a due one is skipped while another is being written, a snapshot waits for it."""
    since = training.step - (training.writer.started_step or 0)
    if not urgent and not _save_due(training.recipe.run, since, time.monotonic() - training.saved_at):
        return
    if snapshot:
        training.writer.wait(_SNAPSHOT_WAIT_S)
    if training.writer.save(training.tensors(), training.header(), snapshot=snapshot):
        training.saved_at = time.monotonic()


def _save_due(run: RunSection, steps: int, seconds: float) -> bool:
    """Say whether a save is due so many steps and seconds after the last one."""
    return (steps >= run.sentry_every and seconds >= run.sentry_min_gap_s) or seconds >= run.sentry_max_gap_s


def _beat(training: Training) -> None:
    """Tell health checks that the run is alive."""
    if time.monotonic() - training.beat_at >= _HEARTBEAT_GAP_S or training.step == training.recipe.train.max_steps:
        training.beat_at = time.monotonic()
        beat = {"step": training.step, "time": time.time()}
        training.metrics.scribe.put("heartbeat.json", lambda: write_json(training.run.heartbeat, beat, durable=False))


def _finish(training: Training, stop: StopSignal) -> None:
    """Save the last step for sure, and score the held-out text once more with the rows shuffled among the words."""
    if training.writer.wait() != training.step:
        training.writer.save_now(training.tensors(), training.header())
    num_rows = training.inputs.num_new_tokens
    order_N = torch.tensor(epoch_order(num_rows, training.recipe.train.seed, 0))
    if not training.metrics.has(training.step, "control/bits_per_char"):
        with stop.interruptible(), training.model.shuffled_rows(order_N):
            values = _losses(training, training.model.token_losses, training.inputs.val_blocks)
        _record(training, {"control/bits_per_char": values["val/bits_per_char"]})
    training.metrics.sync()
    if training.writer.num_skipped:
        training.console.say(f"{training.writer.num_skipped} saves came due while one was being written: skipped")
