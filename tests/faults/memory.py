"""Promise: out of host memory ends with a message and a run that continues."""

import random
import signal

from faults import hooks
from faults.lab import DONE, KILL, USER, Lab, newest_step, no_traceback

from wake2vec.rundir import RunDir

_MIB = 2**20


def host_memory(lab: Lab, count: int) -> str:
    """Run under limits of the address space, of processes and of a control group; then without them."""
    outcomes = lab.each(count, lambda _, rng: _limited_run(lab, rng))
    outcomes += [_without_threads(lab), _in_group(lab)]
    told = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return f"{count + 2} limits: {told}"


def _limited_run(lab: Lab, rng: random.Random) -> str:
    """The address space may grow by so much only, from the start or from some step on."""
    runs = lab.fresh()
    more, step = rng.randrange(0, 60 * _MIB), rng.choice([-1, 0, 5, 20])
    done = lab.train(runs, prepare=[(hooks.limit_memory, (more, step))]).wait()
    return _ends_well(lab, runs, done, f"{more} bytes more, from step {step}")


def _ends_well(lab: Lab, runs, done, where: str) -> str:  # noqa: ANN001
    no_traceback(done)
    # the C++ runtime ends a process that cannot even raise; the kernel kills one that is over its group's limit
    assert done.code in (DONE, USER, -KILL, -signal.SIGABRT, -signal.SIGSEGV), f"{where}: {done}"
    if done.code == USER:
        assert "memory" in done.err, f"{where}: {done}"
    newest_step(RunDir(runs / "tiny"))
    lab.train_to_end(runs)
    return {DONE: "went on", USER: "ended with a message"}.get(done.code, "killed") + ", then to its end"
