"""What the end of a run is compared by: to the bit, but for times, rates and memory."""

import torch

from wake2vec import sentry
from wake2vec.metrics import Record, read_records
from wake2vec.rundir import RunDir

_TIMED = ("time/", "throughput/", "memory/")


def numbers(run: RunDir) -> list[Record]:
    """Return every logged number but times and memory."""
    return [{k: v for k, v in record.items() if not k.startswith(_TIMED)} for record in read_records(run.metrics)]


def assert_same_end(run: RunDir, reference: RunDir, step: int, *, same_identity: bool = True) -> None:
    """Compare the sentries of a step, rows, optimizer and header, every logged number and the loss table."""
    ours, theirs = sentry.read(run.sentry(step)), sentry.read(reference.sentry(step))
    assert ours.tensors.keys() == theirs.tensors.keys(), f"{[*ours.tensors]}, the reference has {[*theirs.tensors]}"
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name
    identity = {} if same_identity else {"identity": None}
    assert {**ours.header, **identity} == {**theirs.header, **identity}, f"{ours.header}\n{theirs.header}"
    ours_said, theirs_said = numbers(run), numbers(reference)
    apart = [record for record in ours_said + theirs_said if (record in ours_said) != (record in theirs_said)]
    assert ours_said == theirs_said, f"the numbers differ from the reference's: {apart}"
    tables = [of.loss_table.read_text() for of in (run, reference)]
    assert tables[0] == tables[1], "\n".join(tables)
