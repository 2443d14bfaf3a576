"""Promise: out of host or GPU memory ends with a message and a run that continues."""

import math
import random
import signal
from pathlib import Path

import torch
from ends import numbers
from faults import hooks
from faults.lab import DONE, KILL, STEPS, USER, Done, Lab, newest_step, no_traceback, refused

from wake2vec import sentry
from wake2vec.rundir import RunDir

_MIB = 2**20
_GROUPS = Path("/sys/fs/cgroup/memory")
_ABORTED = (-KILL, -signal.SIGABRT, -signal.SIGSEGV, 127)
"""By the kernel where a group's limit is reached; by the C++ runtime, or glibc (127), that cannot even raise."""


def short_of_memory(lab: Lab, count: int) -> str:
    """Run under limits of the address space, of processes, of a control group and of a GPU; then without them."""
    outcomes = lab.each(count, lambda _, rng: _limited_run(lab, rng))
    outcomes += [_for_an_object(lab), _without_threads(lab), _in_group(lab)]
    outcomes += [_on_a_full_gpu(lab, *how) for how in _FULL_GPU]
    told = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return f"{len(outcomes)} limits: {told}"


def _limited_run(lab: Lab, rng: random.Random) -> str:
    """The address space may grow by so much only, from the start or from some step on."""
    runs = lab.fresh()
    more, step = rng.randrange(0, 60 * _MIB), rng.choice([-1, 0, 5, 20])
    done = lab.train(runs, prepare=[(hooks.limit_memory, (more, step))]).wait()
    return _ends_well(lab, runs, done, f"{more} bytes more, from step {step}", exact=False)


def _for_an_object(lab: Lab) -> str:
    """Python itself gets no memory in the middle of the loop."""
    runs = lab.fresh()
    done = lab.train(runs, prepare=[(hooks.allocate_too_much, (7,))]).wait()
    refused(done, "memory: this machine, or the limit it runs under, has no more")
    return _ends_well(lab, runs, done, "an object")


def _without_threads(lab: Lab) -> str:
    """No further thread can be started: saves fail with a message, and the run is none the worse."""
    runs = lab.fresh()
    done = lab.train(runs, prepare=[(hooks.no_more_threads, (3,))]).wait()
    return _ends_well(lab, runs, done, "no more threads")


_FULL_GPU = [
    ("base.load", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 MiB. GPU 0 has no more")),
    ("make_optimizer", RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
    ("evaluate", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
]
"""What torch says where other programs hold the card's memory; on a card itself: `tests/test_gpu.py`."""


def _on_a_full_gpu(lab: Lab, name: str, error: Exception) -> str:
    """A run cannot begin, then not go on, because a GPU's memory is taken."""
    runs = lab.fresh()
    full = (hooks.fill_gpu, (name, error))
    said = f"out of memory on the GPU ({str(error).splitlines()[0]}); free the card"
    refused(lab.train(runs, prepare=[full]).wait(), said)
    assert lab.train(runs, prepare=[(hooks.kill_after_step, (8,))]).wait().code == -KILL
    done = lab.train(runs, prepare=[full]).wait()
    refused(done, said)
    return _ends_well(lab, runs, done, f"{name} on a full GPU")


def _in_group(lab: Lab) -> str:
    """A control group that is too small: the kernel kills the run."""
    group = _GROUPS / f"wake2vec-{lab.seed}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(40 * _MIB))
        runs = lab.fresh()
        done = lab.train(runs, prepare=[(hooks.enter_group, (group, 10))]).wait()
        assert done.code == -KILL, f"the group's limit did nothing: {done}"
        return _ends_well(lab, runs, done, "control group")
    finally:
        group.rmdir()


def _ends_well(lab: Lab, runs: Path, done: Done, where: str, *, exact: bool = True) -> str:
    no_traceback(done)
    assert done.code in (DONE, USER, *_ABORTED), f"{where}: {done}"
    if done.code == USER:
        assert "memory" in done.err, f"{where}: {done}"
    newest_step(RunDir(runs / "tiny"))
    if exact:
        lab.train_to_end(runs)
    else:
        ended = lab.train(runs).wait()
        assert ended.code == DONE, ended
        _check_close(lab, RunDir(runs / "tiny"))
    return {DONE: "went on", USER: "ended with a message"}.get(done.code, "killed") + ", then to its end"


def _check_close(lab: Lab, run: RunDir) -> None:
    """Compare a run's end with the reference's but for rounding: MKL multiplies otherwise where its buffers fail."""
    ours, theirs = sentry.read(run.sentry(STEPS)), sentry.read(lab.reference.sentry(STEPS))
    for name, tensor in theirs.tensors.items():
        assert torch.allclose(ours.tensors[name], tensor, rtol=1e-3, atol=1e-4), name
    ours_said, theirs_said = numbers(run), numbers(lab.reference)
    assert [record.keys() for record in ours_said] == [record.keys() for record in theirs_said]
    for our, their in zip(ours_said, theirs_said, strict=True):
        apart = [key for key, value in their.items() if not math.isclose(our[key], value, rel_tol=1e-3)]
        assert not apart, f"{apart}: {our}, the reference has {their}"
