"""The metrics file and the loss table."""

import errno
import json
from pathlib import Path

import pytest

from wake2vec import metrics
from wake2vec.metrics import MetricsLog, loss_table, read_records
from wake2vec.rundir import RunDir

RECORDS = [
    {"step": 0, "val/loss_nats": 5.0, "val/bits_per_char": 2.5, "base/bits_per_char": 1.75},
    {"step": 2, "train/loss_nats": 4.0},
    {"step": 4, "train/loss_nats": 3.5},
    {"step": 4, "val/loss_nats": 3.25, "val/bits_per_char": 1.5},
    {"step": 6, "train/loss_nats": 3.0},
    {"step": 8, "train/loss_nats": 2.5},
    {"step": 8, "val/loss_nats": 3.5, "val/bits_per_char": 1.625},
    {"step": 8, "control/bits_per_char": 3.0},
]

TABLE = """\
| Step | Train | Val | Notes |
|------|-------|-----|-------|
| 0 |  | 5.0000 | 2.5000 bits/char, base model 1.7500, best so far |
| 4 | 3.5000 | 3.2500 | 1.5000 bits/char, best so far |
| 8 | 2.5000 | 3.5000 | 1.6250 bits/char, rows shuffled 3.0000 |
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return run


def test_loss_table_has_the_seeds_columns() -> None:
    assert loss_table(RECORDS) == TABLE
    assert loss_table([]) == "".join(TABLE.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("torn", ['{"step": 9', '{"step": 9}', '{"step": 9, "a": "\x00\x00', "\x00" * 40])
def test_torn_last_line_is_left_out_and_mended(torn: str, run: RunDir) -> None:
    with open(run.metrics, "a") as file:
        file.write(torn)
    whole = [*RECORDS, {"step": 9}] if torn.endswith("}") else RECORDS
    assert read_records(run.metrics) == whole
    log = MetricsLog(run, step=9, say=print)
    log.append(10, {"a": 1})
    log.close()
    assert read_records(run.metrics) == [*whole, {"step": 10, "a": 1}]


@pytest.mark.parametrize("line", ["5", "[]", "null", '{"loss": 1}', '{"step": "1"}', "{" * 10])
def test_line_that_is_no_record_is_left_out(line: str, run: RunDir) -> None:
    run.metrics.write_text(line + "\n" + run.metrics.read_text())
    assert read_records(run.metrics) == RECORDS


def test_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("step", [-1, 0, 3, 4, 7, 8, 100])
def test_opening_cuts_back_to_a_step(step: int, run: RunDir) -> None:
    wanted = [record for record in RECORDS if record["step"] <= step]
    log = MetricsLog(run, step, print)
    log.close()
    assert log.records == wanted
    assert read_records(run.metrics) == wanted
    assert run.loss_table.read_text() == loss_table(wanted)


def test_append_is_on_disk_at_once_and_exact(run: RunDir) -> None:
    log = MetricsLog(run, 0, print)
    log.append(3, {"train/loss_nats": 0.1 + 0.2, "n": 7})
    log.sync()
    assert read_records(run.metrics)[-1] == {"step": 3, "train/loss_nats": 0.1 + 0.2, "n": 7}
    assert log.records == read_records(run.metrics)
    assert run.metrics.read_bytes().endswith(b"}\n")
    log.close()


def test_has_and_value_find_what_is_on_record(run: RunDir) -> None:
    log = MetricsLog(run, 8, print)
    log.close()
    assert log.has(4, "val/loss_nats")
    assert log.has(4, "train/loss_nats")
    assert not log.has(6, "val/loss_nats")
    assert not log.has(5, "step")
    assert log.value("train/loss_nats") == 2.5
    assert log.value("train/loss_nats", step=4) == 3.5
    assert log.value("base/bits_per_char") == 1.75
    assert log.value("train/loss_nats", step=0) is None
    assert log.value("nothing") is None


def test_best_step_is_that_of_the_lowest_held_out_loss(run: RunDir) -> None:
    log = MetricsLog(run, 8, print)
    assert log.best_step() == 4
    log.append(12, {"val/loss_nats": 3.25})
    assert log.best_step() == 4  # the first of equals
    log.append(16, {"val/loss_nats": 3.125})
    assert log.best_step() == 16
    log.close()


def test_best_step_of_nothing_is_none(tmp_path: Path) -> None:
    log = MetricsLog(RunDir(tmp_path), 0, print)
    log.close()
    assert log.best_step() is None


def test_damaged_line_is_named_and_left_out(run: RunDir) -> None:
    MetricsLog(run, 100, print).close()  # now with checksums
    lines = run.metrics.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"3.5", b"3.4")
    run.metrics.write_bytes(b"\n".join(lines))
    said: list[str] = []
    log = MetricsLog(run, 100, said.append)
    log.close()
    assert said == ["metrics.jsonl is damaged: lines 3 are left out"]
    assert log.records == [record for record in RECORDS if record != RECORDS[2]]


def test_line_that_finds_no_room_is_finished_later(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(run, 8, print)
    plain, room = metrics.os.write, [5]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = plain(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(metrics.os, "write", write)
    log.append(9, {"a": 1})
    with pytest.raises(OSError, match="No space"):
        log.sync()
    room[0] = 10**6
    log.append(10, {"a": 2})
    log.sync()
    log.close()
    assert read_records(run.metrics)[-2:] == [{"step": 9, "a": 1}, {"step": 10, "a": 2}]
