"""The training of a run, to its end.

    for step in (last saved step + 1) .. max_steps:
        forward and backward over the micro-batches of batch(step)      a signal drops this part
        clip, update the rows in place                                  a signal waits for this part
        log, evaluate, save: each where it is due

batch(step) and learning_rate(step) are pure functions, so rows, optimizer state and the step are all a resume needs.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from wake2vec import identity
from wake2vec.config import Recipe, RunSection
from wake2vec.data import PAD, Blocks, batch_indices, epoch_order
from wake2vec.errors import Stopped, WakeError
from wake2vec.evaluate import TokenLosses, evaluate
from wake2vec.metrics import Record, read_records
from wake2vec.optimizer import clip_scale, grad_norm
from wake2vec.plan import Plan
from wake2vec.reference import WordLosses
from wake2vec.resume import Console, LossWindow, Training, resume
from wake2vec.rundir import RunDir, hold, write_json
from wake2vec.schedule import learning_rate_at
from wake2vec.signals import StopSignal

_HEARTBEAT_GAP_S = 5.0


def train(
    recipe: Recipe, run: RunDir, console: Console, *, allow_stack_change: bool | None = None, plan: Plan | None = None
) -> list[Record]:
    """Start or continue a run and see it to its end; return its metrics.

    Args:
        plan: what a new run follows in place of the planner's choice.

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
                    return read_records(run.metrics)
            commit = record["identity"]["base"]["commit"] if record is not None else None
            inputs = identity.read_inputs(recipe, commit, console.say)
            if record is not None:
                identity.check_inputs(run, record, inputs)
            training = resume(recipe, run, console, record, inputs, plan=plan, allow_stack_change=allow_stack_change)
        try:
            _loop(training, stop)
        except Stopped:
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


def _loop(training: Training, stop: StopSignal) -> None:
    """Run the steps that are left; on `Stopped` the rows are those of `training.step`."""
    train = training.recipe.train
    _after_step(training, stop)
    for step in range(training.step + 1, train.max_steps + 1):
        started = time.monotonic()
        with stop.interruptible():
            gradient = _gradient(training, step)
        training.writer.wait_for_copy()
        rate = learning_rate_at(
            step, learning_rate=train.learning_rate, warmup_steps=train.warmup_steps, max_steps=train.max_steps
        )
        training.optimizer.step(rate, clip_scale(gradient.norm, train.max_grad_norm) / gradient.num_scored)
        training.step = step
        training.window.add(gradient.loss, time.monotonic() - started)
        _log(training, rate, float(gradient.norm))
        _after_step(training, stop)
        stop.check()
    _finish(training, stop)


@dataclass(frozen=True)
class Gradient:
    """What a step's forward and backward leave beside the rows' gradients, which are those of the summed loss."""

    loss: float
    norm: Tensor
    num_scored: int


def _gradient(training: Training, step: int) -> Gradient:
    """Fill the rows' gradients with those of a step; loss and norm are those of its mean, in nats a token."""
    train, model = training.recipe.train, training.model
    all_blocks = training.inputs.train_blocks.ids_KT
    indices = batch_indices(step, batch_size=train.batch_size, num_blocks=len(all_blocks), seed=train.seed)
    blocks_BT = all_blocks[indices]
    num_scored = int((blocks_BT[:, 1:] != PAD).sum())
    blocks_BT = blocks_BT.to(model.base.device)
    model.zero_grad()
    losses = [model.backward(micro) for micro in blocks_BT.split(training.plan.micro_batch_size)]
    norm = grad_norm(model.rows.values()) / num_scored
    loss = float(torch.stack(losses).sum()) / num_scored
    if not math.isfinite(loss) or not math.isfinite(float(norm)):
        raise WakeError(
            f"step {step}: loss {loss}, gradient norm {float(norm)}, blocks {indices}; the sentry of step "
            f"{training.writer.saved_step} is whole and kept; look at these blocks, or begin another run with a lower "
            "train.learning_rate"
        )
    return Gradient(loss, norm, num_scored)


def _after_step(training: Training, stop: StopSignal) -> None:
    """Evaluate and save where it is due: also after a step taken up again, where a signal may have come between."""
    run, train, step = training.recipe.run, training.recipe.train, training.step
    if (step % run.eval_every == 0 or step == train.max_steps) and not training.metrics.has(step, "val/loss_nats"):
        with stop.interruptible():
            _evaluate(training)
    snapshot = run.snapshot_every > 0 and step > 0 and step % run.snapshot_every == 0
    if training.writer.saved_step != step:
        urgent = snapshot or step in (0, train.max_steps, training.metrics.best_step())
        _save(training, urgent=urgent, snapshot=snapshot)
    _beat(training)


def _evaluate(training: Training) -> None:
    """Put the losses on held-out text on record; at the start the base model's too: the number a run must beat."""
    words = WordLosses(training.inputs.num_new_tokens, training.inputs.base_vocab_size)
    values = _losses(training, training.model.token_losses, training.inputs.val_blocks, words)
    if not math.isfinite(values["val/loss_nats"]):
        raise WakeError(
            f"step {training.step}: loss {values['val/loss_nats']} on the held-out text; the sentry of step "
            f"{training.writer.saved_step} is whole and kept; begin another run with a lower train.learning_rate"
        )
    if training.step == 0:
        base = _losses(training, training.model.base_token_losses, training.inputs.base_val_blocks)
        values["base/bits_per_char"] = base["val/bits_per_char"]
    last = training.step == training.recipe.train.max_steps
    training.reference.after_evaluation(training.step, words, training.model.rows["input"], last=last)
    _record(training, values)


def _losses(
    training: Training, token_losses: TokenLosses, blocks: Blocks, words: WordLosses | None = None
) -> dict[str, float]:
    return evaluate(
        token_losses,
        blocks,
        first_new_id=training.inputs.base_vocab_size,
        batch_size=training.plan.micro_batch_size,
        device=training.model.base.device,
        each=words.add if words else None,
    )


def _record(training: Training, values: dict[str, float]) -> None:
    training.metrics.append(training.step, values)
    training.metrics.write_loss_table()
    training.console.log(training.step, values)


def _log(training: Training, rate: float, norm: float) -> None:
    """Show the step and, where a line is due, put the mean over the steps since the last one on record."""
    train, window, metrics = training.recipe.train, training.window, training.metrics
    step_s = window.seconds / window.num_timed
    values = {
        "train/loss_nats": window.loss_sum / window.num_steps,
        "optim/learning_rate": rate,
        "optim/grad_norm": norm,
        "time/step_s": step_s,
        "throughput/tokens_per_s": train.batch_size * training.recipe.data.seq_len / step_s,
        "memory/peak_gib": training.model.peak_memory_bytes() / 2**30,
    }
    val = {key: value for key in ("val/loss_nats", "val/bits_per_char") if (value := metrics.value(key)) is not None}
    training.console.step(training.step, train.max_steps, {**values, **val})
    if training.step % training.recipe.run.log_every == 0 or training.step == train.max_steps:
        metrics.append(training.step, values)
        training.console.log(training.step, values)
        training.window = LossWindow()


def _save(training: Training, *, urgent: bool, snapshot: bool) -> None:
    """Start a save where one is due; a due one is skipped while another is being written, a snapshot waits for it."""
    since = training.step - (training.writer.started_step or 0)
    if not urgent and not _save_due(training.recipe.run, since, time.monotonic() - training.saved_at):
        return
    if snapshot:
        training.writer.wait()
    if training.writer.save(training.tensors(), training.header(), snapshot=snapshot):
        training.saved_at = time.monotonic()


def _save_due(run: RunSection, steps: int, seconds: float) -> bool:
    """Say whether a save is due so many steps and seconds after the last one."""
    return (steps >= run.sentry_every and seconds >= run.sentry_min_gap_s) or seconds >= run.sentry_max_gap_s


def _beat(training: Training) -> None:
    """Tell health checks that the run is alive."""
    if time.monotonic() - training.beat_at >= _HEARTBEAT_GAP_S or training.step == training.recipe.train.max_steps:
        training.beat_at = time.monotonic()
        write_json(training.run.heartbeat, {"step": training.step, "time": time.time()}, durable=False)


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
