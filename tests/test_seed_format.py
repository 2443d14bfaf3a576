"""The earlier scripts' `.pt` files: written for them, read without unpickling; and what `sentries` does with them."""

import collections
import io
import os
import pickle
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NEW, Quiet, make_inputs, make_recipe, run_to_end
from tokenizers_tiny import qwen, wake_lexicon
from torch import Tensor

from wake2vec import keeping, sentry
from wake2vec.errors import Stopped, WakeError
from wake2vec.rundir import RunDir, hold, read_json
from wake2vec.seed_format import read_pt, write_pt
from wake2vec.train import train

HIDDEN = 64  # of the tiny base


def seed_payload(num: int = 5, *, first: int = 484, step: int = 20, hidden: int = HIDDEN) -> dict[str, Any]:
    """Return what the earlier script saved."""
    rows = torch.randn(num, hidden, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    return {
        "embeddings": rows,
        "step": step,
        "best_metric": None,
        "epoch": 0.25,
        "wake_start": first,
        "num_wake": num,
    }


def save(path: Path, payload: Any) -> Path:
    torch.save(payload, path)
    return path


def test_file_of_the_earlier_script_is_read(tmp_path: Path) -> None:
    payload = seed_payload()
    read = read_pt(save(tmp_path / "sentry_step_0020.pt", {**payload, "best_metric": 15.09}))
    assert read["embeddings"].dtype == torch.float32
    assert torch.equal(read["embeddings"], payload["embeddings"].float())
    assert {**read, "embeddings": 0} == {**payload, "embeddings": 0, "best_metric": 15.09}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    payload = seed_payload()
    payload["embeddings"] = payload["embeddings"].to(dtype)
    assert torch.equal(read_pt(save(tmp_path / "a.pt", payload))["embeddings"], payload["embeddings"].float())


@pytest.mark.parametrize("names", [("input",), ("input", "head")])
def test_written_file_has_the_seeds_content_and_size(names: tuple[str, ...], tmp_path: Path) -> None:
    rows = {name: torch.randn(700, HIDDEN) for name in names}
    path = tmp_path / "a.pt"
    write_pt(path, rows, step=40, epoch=0.5, first_new_id=484)
    loaded = torch.load(path, weights_only=True)
    keys = {"embeddings", "step", "best_metric", "epoch", "wake_start", "num_wake"}
    assert loaded.keys() == (keys if names == ("input",) else {*keys, "head_embeddings"})
    assert loaded["embeddings"].dtype == torch.float16
    assert torch.equal(loaded["embeddings"], rows["input"].to(torch.float16))
    assert (loaded["step"], loaded["best_metric"], loaded["epoch"]) == (40, None, 0.5)
    assert (loaded["wake_start"], loaded["num_wake"]) == (484, 700)
    assert 0 < path.stat().st_size - 2 * 700 * HIDDEN * len(names) < 10_000
    assert torch.equal(read_pt(path)["embeddings"], rows["input"].half().float())
    if "head" in rows:
        assert torch.equal(read_pt(path)["head_embeddings"], rows["head"].half().float())


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


class Sets:
    """Pickles to an object with a state, which the BUILD opcode sets."""

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), {"x": 1}


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "in a dictionary": lambda marker: {**seed_payload(), "note": Calls(os.mkdir, str(marker))},
    "nested pickle": lambda marker: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(marker)))),
    "torch.load": lambda marker: Calls(torch.load, str(marker)),
    "another class": lambda _: {**seed_payload(), "note": Path("x")},
    "a type": lambda _: {**seed_payload(), "note": torch.Tensor},
    "a parameter": lambda _: {**seed_payload(), "embeddings": torch.nn.Parameter(torch.zeros(5, HIDDEN))},
    "a state": lambda _: {**seed_payload(), "note": Sets()},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "a.pt", HOSTILE[kind](marker))
    with pytest.raises(WakeError, match=r"refused: it (asks for|uses)"):
        read_pt(path)
    assert not marker.exists()


def pickled(path: Path, code: bytes, *, data: bytes = bytes(2 * 6), name: str = "a/data.pkl") -> Path:
    """Write a file of torch.save's layout with any pickle in it, and one storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, code)
        archive.writestr("a/data/0", data)
    return path


def tensor_code(
    *, offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), numel: Any = 6, key: Any = "0", kind: Any = "storage"
) -> bytes:
    """Return the pickle of a file whose tensor is what the arguments say."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return (kind, torch.HalfStorage, key, "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    rebuild = Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, collections.OrderedDict())
    Pickler(buffer, 2).dump({**seed_payload(2), "embeddings": rebuild})
    return buffer.getvalue()


def test_handmade_file_is_read(tmp_path: Path) -> None:
    path = pickled(tmp_path / "a.pt", tensor_code(), data=torch.arange(6, dtype=torch.float16).numpy().tobytes())
    assert read_pt(path)["embeddings"].tolist() == [[0, 1, 2], [3, 4, 5]]


LIES: dict[str, dict[str, Any]] = {
    "numel too large": {"numel": 7},
    "numel too small": {"numel": 5},
    "numel no number": {"numel": "6"},
    "numel a list": {"numel": None},
    "offset": {"offset": 1},
    "offset negative": {"offset": -1},
    "offset no number": {"offset": "0"},
    "shape too large": {"size": (2**62, 3)},
    "shape too small": {"size": (1, 3)},
    "shape negative": {"size": (-2, -3)},
    "shape fractional": {"size": (0.5, 12)},
    "shape no tuple": {"size": 6},
    "shape of bools": {"size": (True, 6), "stride": (6, 1)},
    "stride overlaps": {"stride": (0, 1)},
    "stride outside": {"stride": (2**40, 1)},
    "stride transposed": {"stride": (1, 2)},
    "stride short": {"stride": (3,)},
    "stride no tuple": {"stride": None},
    "storage not there": {"key": "1"},
    "storage outside": {"key": "../../../etc/passwd"},
    "storage no name": {"key": None},
    "no storage": {"kind": "module"},
    "kind no name": {"kind": 1},
}


@pytest.mark.parametrize("lie", LIES)
def test_tensor_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=r"a\.pt: (refused|damaged)"):
        read_pt(pickled(tmp_path / "a.pt", tensor_code(**LIES[lie])))


CODES: dict[str, bytes] = {
    "empty": b"",
    "cut off": tensor_code()[:-20],
    "no dictionary": pickle.dumps(5, 2),
    "protocol 0": b"cos\nsystem\n(S'true'\ntR.",
    "protocol 4": pickle.dumps(os.system, 4),
    "instance": b"(S'true'\nios\nsystem\n.",
    "memory for the memo": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "long string": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "extension": b"\x80\x02\x82\x01.",
    "memo that is not there": b"\x80\x02h\x05.",
    "empty stack": b"\x80\x02.",
    "deep": b"\x80\x02" + b"N" + b"\x85" * 200_000 + b".",
    "noise": bytes(range(256)),
    "tensor called": pickle.dumps(Calls(collections.OrderedDict, 1, 2), 2),
}


@pytest.mark.parametrize("kind", CODES)
def test_other_code_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=r"a\.pt: "):
        read_pt(pickled(tmp_path / "a.pt", CODES[kind]))


def test_archive_is_read_in_place_and_never_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = pickled(folder / "a.pt", tensor_code(), name="../../outside/data.pkl")
    with pytest.raises(WakeError, match="damaged"):
        read_pt(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.pt", "inner"]


@pytest.mark.parametrize("names", [[], ["a/data.pkl", "b/data.pkl"], ["data.pkl.txt"]])
def test_archive_without_the_one_pickle_is_refused(names: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, tensor_code())
    with pytest.raises(WakeError, match=r"no single data\.pkl"):
        read_pt(tmp_path / "a.pt")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_archive_is_refused_before_it_grows(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", method) as archive:
        archive.writestr("a/data.pkl", tensor_code())
        archive.writestr("a/data/0", bytes(10**6))
    with pytest.raises(WakeError, match="compressed"):
        read_pt(tmp_path / "a.pt")


def test_file_that_is_none_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match="no such file"):
        read_pt(tmp_path / "none.pt")
    with pytest.raises(WakeError, match=r"not a file of torch\.save"):
        read_pt(tmp_path)
    for content in (b"", b"PK", b"no zip" * 100):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(WakeError, match=r"not a file of torch\.save"):
            read_pt(tmp_path / "a.pt")


def test_damage_anywhere_never_ends_in_a_traceback(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pt", seed_payload()).read_bytes()
    path = tmp_path / "a.pt"
    for at in range(0, len(whole), 13):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                read_pt(path)
            except WakeError as error:
                assert str(error).startswith(f"{path}: ")  # noqa: PT017 - most damage is found, not all of it


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"step": None}, "step is missing or no integer"),
        ({"step": True}, "step is missing or no integer"),
        ({"step": -1}, "step is missing or no integer"),
        ({"wake_start": 1.5}, "wake_start is missing or no integer"),
        ({"num_wake": 6}, r"embeddings has shape \(5, 64\), num_wake is 6"),
        ({"embeddings": 1.0}, "embeddings has shape None"),
        ({"embeddings": torch.zeros(5)}, r"embeddings has shape \(5,\)"),
        ({"embeddings": torch.full((5, HIDDEN), torch.nan)}, "embeddings holds NaN or Inf"),
        ({"head_embeddings": torch.zeros(4, HIDDEN)}, r"head_embeddings has shape \(4, 64\)"),
        ({"head_embeddings": torch.zeros(5, 3)}, "head_embeddings has 3 values a row"),
        ({"head_embeddings": torch.full((5, HIDDEN), torch.inf)}, "head_embeddings holds NaN or Inf"),
    ],
)
def test_content_that_is_no_sentry_is_refused(change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=wanted):
        read_pt(save(tmp_path / "a.pt", {**seed_payload(), **change}))


# --- what `wake2vec sentries` does with a run


class StopsAt(Quiet):
    """Ends a run after a step, as a signal would."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def step(self, step: int, _max_steps: int, _values: Any) -> None:
        if step == self.last:
            raise Stopped("test")


def begin(inputs: Path, folder: Path) -> RunDir:
    """Begin a run and stop it after its first step, which is saved beside the start."""
    run = RunDir(folder)
    with pytest.raises(Stopped):
        train(make_recipe(inputs), run, StopsAt(1))
    return run


@pytest.fixture(scope="session")
def _begun(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return begin(inputs, tmp_path_factory.mktemp("begun") / "run")


@pytest.fixture(scope="session")
def _ended(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    # a snapshot waits for the save before it: every step has its sentry
    changes = {"run": {"keep_last": 20, "eval_every": 100, "snapshot_every": 1}}
    return run_to_end(inputs, tmp_path_factory.mktemp("ended") / "run", changes)


@pytest.fixture
def begun(_begun: RunDir, tmp_path: Path) -> RunDir:
    """Return a run of this test's own that was stopped after step 1."""
    return RunDir(Path(shutil.copytree(_begun.path, tmp_path / "run")))


@pytest.fixture
def ended(_ended: RunDir, tmp_path: Path) -> RunDir:
    """Return a run of this test's own that came to its end with many sentries."""
    return RunDir(Path(shutil.copytree(_ended.path, tmp_path / "run")))


def start_of(run: RunDir) -> dict[str, Tensor]:
    return sentry.read(run.sentry(0)).tensors


def first_id(run: RunDir) -> int:
    return int(read_json(run.identity)["identity"]["base_vocab_size"])


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("head", [True, False])
def test_imported_rows_come_to_the_words_with_their_ids(gap: int, head: bool, begun: RunDir, tmp_path: Path) -> None:
    payload = seed_payload(len(NEW) - gap, first=first_id(begun) + gap, step=7)
    if head:
        payload["head_embeddings"] = payload["embeddings"] + 1
    said = keeping.import_pt(begun, save(tmp_path / "sentry_step_0007.pt", payload))
    found, start = sentry.read(begun.sentry(7)), start_of(begun)
    assert torch.equal(found.tensors["rows/input"][gap:], payload["embeddings"].float())
    assert torch.equal(found.tensors["rows/input"][:gap], start["rows/input"][:gap])
    if head:
        assert torch.equal(found.tensors["rows/head"][gap:], payload["head_embeddings"].float())
        assert torch.equal(found.tensors["rows/head"][:gap], start["rows/head"][:gap])
    else:
        assert torch.equal(found.tensors["rows/head"], start["rows/head"])
    fresh = ([f"{gap} input rows"] if gap else []) + ([] if head else ["all head rows"])
    event = read_json(begun.identity)["history"][-1]
    assert (event["imported"], event["from_step"], event["fresh"]) == ("sentry_step_0007.pt", 7, fresh)
    assert all(part in said for part in fresh)
    assert keeping.list_sentries(begun)[0]["step"] == 7


def test_imported_run_continues(begun: RunDir, inputs: Path, tmp_path: Path) -> None:
    payload, start = seed_payload(len(NEW), first=first_id(begun), step=9), start_of(begun)
    keeping.import_pt(begun, save(tmp_path / "a.pt", payload))
    console = Quiet()
    train(make_recipe(inputs), begun, console)
    assert any(said.startswith("continuing after step 9 of 12") for said in console.said)
    rows = sentry.read(begun.sentry(12)).tensors["rows/input"]
    moved = (rows - payload["embeddings"].float()).abs().max()
    assert 0 < moved < 0.2  # three steps from the imported rows, not from the start
    assert (rows - start["rows/input"]).abs().max() > 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"num": 9}, "its rows are of ids 484 to 492, the run's new words are 484 to 493: another lexicon"),
        ({"num": 11}, "its rows are of ids 484 to 494"),
        ({"first": 480}, "its rows are of ids 480 to 489"),
        ({"first": 485}, "its rows are of ids 485 to 494"),
        ({"hidden": 32}, "its rows have 32 values, the run's 64: another base"),
        ({"step": 13}, "it is of step 13, the run ends at 12"),
        ({"step": 1}, "it is of step 1, the run is at 1 already"),
        ({"step": 0}, "it is of step 0, the run is at 1 already"),
    ],
)
def test_import_of_another_run_is_refused(change: dict[str, Any], wanted: str, begun: RunDir, tmp_path: Path) -> None:
    assert first_id(begun) == 484
    before = sorted(path.name for path in begun.sentries.iterdir())
    payload = seed_payload(**{"num": len(NEW), "step": 7, **change})
    with pytest.raises(WakeError, match=wanted):
        keeping.import_pt(begun, save(tmp_path / "a.pt", payload))
    assert sorted(path.name for path in begun.sentries.iterdir()) == before
    assert not read_json(begun.identity)["history"]


def test_import_names_every_difference_at_once(begun: RunDir, tmp_path: Path) -> None:
    with pytest.raises(WakeError) as caught:
        keeping.import_pt(begun, save(tmp_path / "a.pt", seed_payload(9, hidden=8, step=99)))
    assert len(str(caught.value).split("\n")) == 3


def test_import_of_head_rows_into_a_tied_run_is_refused(tied_inputs: Path, tmp_path: Path) -> None:
    run = begin(tied_inputs, tmp_path / "run")
    payload = seed_payload(len(NEW), first=first_id(run), step=7)
    path = save(tmp_path / "a.pt", {**payload, "head_embeddings": payload["embeddings"]})
    with pytest.raises(WakeError, match="tied to its input"):
        keeping.import_pt(run, path)
    keeping.import_pt(run, save(path, payload))
    assert sentry.read(run.sentry(7)).tensors.keys() == start_of(run).keys()


def test_import_needs_the_start_and_the_run_to_itself(begun: RunDir, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", seed_payload(len(NEW), first=first_id(begun), step=7))
    with hold(begun), pytest.raises(WakeError, match="held by process"):
        keeping.import_pt(begun, path)
    begun.sentry(0).unlink()
    with pytest.raises(WakeError, match="first sentry, which fills what"):
        keeping.import_pt(begun, path)


def test_exported_file_holds_the_sentrys_rows(ended: RunDir) -> None:
    keeping.export_pt(ended, 12)
    read, tensors = read_pt(ended.path / "sentry_step_0012.pt"), sentry.read(ended.sentry(12)).tensors
    assert torch.equal(read["embeddings"], tensors["rows/input"].half().float())
    assert torch.equal(read["head_embeddings"], tensors["rows/head"].half().float())
    blocks = read_json(ended.identity)["identity"]["num_train_blocks"]
    assert (read["step"], read["wake_start"], read["num_wake"]) == (12, first_id(ended), len(NEW))
    assert read["epoch"] == 12 * 4 / blocks
    with pytest.raises(WakeError, match=r"no sentry of step 13; there are 12, 11, "):
        keeping.export_pt(ended, 13)
    damage(ended.sentry(10))
    with pytest.raises(WakeError, match="damaged: its content does not match its sha256; choose another step"):
        keeping.export_pt(ended, 10)


def damage(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_list_names_the_state_of_every_file(ended: RunDir) -> None:
    steps = [entry["step"] for entry in keeping.list_sentries(ended)]
    assert steps == list(range(12, -1, -1))
    damage(ended.sentry(10))
    os.truncate(ended.sentry(8), 100)
    ended.sentry(6).rename(ended.sentries / f"{ended.sentry(6).name}.damaged")
    listed = {entry["file"]: entry for entry in keeping.list_sentries(ended)}
    states = {name: entry["state"] for name, entry in listed.items()}
    assert states[ended.sentry(12).name] == "verified"
    assert states[ended.sentry(10).name] == "damaged: its content does not match its sha256"
    assert states[ended.sentry(8).name] == "damaged: its header is cut off or not a sentry's"
    assert states[f"{ended.sentry(6).name}.damaged"] == "damaged: put aside"
    last = listed[ended.sentry(12).name]
    assert last["size_bytes"] == ended.sentry(12).stat().st_size
    assert last["val_loss_nats"] == sentry.read_header(ended.sentry(12))["val_loss_nats"]
    assert last["saved_unix_s"] == ended.sentry(12).stat().st_mtime


def set_keep_last(run: RunDir, keep_last: int) -> None:
    """Make a copied run one whose recipe keeps few sentries, in run.json and in every sentry alike."""
    from wake2vec import identity
    from wake2vec.record import write_run

    record = read_json(run.identity)
    record["identity"]["recipe"]["run"]["keep_last"] = keep_last
    record["identity_sha256"] = identity.digest(record["identity"])
    write_run(run, record)
    for path in run.sentries.glob("*.safetensors"):
        found = sentry.read(path)
        sentry.write(path, found.tensors, {**found.header, "identity": record["identity_sha256"]})


def test_prune_keeps_what_the_recipe_keeps(ended: RunDir) -> None:
    set_keep_last(ended, 2)
    best = sentry.read_header(ended.sentry(12))["best_step"]
    keeping.prune(ended)
    assert {entry["step"] for entry in keeping.list_sentries(ended)} == {12, 11} | {best}
    assert keeping.prune(ended) == "removed 0: nothing to remove"


def test_prune_never_removes_the_last_good_one(ended: RunDir) -> None:
    set_keep_last(ended, 1)
    steps = [entry["step"] for entry in keeping.list_sentries(ended)]
    for step in steps[:3]:
        damage(ended.sentry(step))
    said = keeping.prune(ended)
    whole = [entry["step"] for entry in keeping.list_sentries(ended) if entry["state"] == "verified"]
    assert whole[0] == steps[3]
    assert sentry.read(ended.sentry(steps[3])).step == steps[3]
    assert said.count("put aside") == 3
    for step in whole:
        damage(ended.sentry(step))
    before = len(list(ended.sentries.iterdir()))
    with pytest.raises(WakeError, match="has no whole sentry; nothing is removed"):
        keeping.prune(ended)
    assert len(list(ended.sentries.iterdir())) == before


def test_prune_needs_the_run_to_itself(ended: RunDir) -> None:
    with hold(ended), pytest.raises(WakeError, match="held by process"):
        keeping.prune(ended)


@pytest.mark.slow
def test_the_earlier_runs_rows_land_on_the_right_words(tmp_path: Path) -> None:
    """43,824 rows from id 152,064 on, Qwen's vocabulary, the real lexicon: the padding gap's words start fresh."""
    (tmp_path / "inputs").mkdir()
    inputs = make_inputs(tmp_path / "inputs", tokenizer=qwen())
    lexicon = inputs / "lexicon.txt"
    lexicon.write_bytes(wake_lexicon().read_bytes())
    changes = {"train": {"max_steps": 30, "warmup_steps": 1}, "run": {"keep_every": 100}}

    class Stops(Quiet):
        def step(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    run = RunDir(tmp_path / "run")
    with pytest.raises(Stopped):
        train(make_recipe(inputs, changes), run, Stops())
    path = save(tmp_path / "sentry_step_0020.pt", seed_payload(43_824, first=152_064, step=20))
    assert "fresh: 399 input rows" in keeping.import_pt(run, path)
    rows = sentry.read(run.sentry(20)).tensors["rows/input"]
    words = read_json(run.identity)["identity"]["num_new_tokens"]
    assert (len(rows), words) == (44_223, 44_223)
    assert torch.equal(rows[399:], seed_payload(43_824)["embeddings"].float())
    assert torch.equal(rows[:399], sentry.read(run.sentry(0)).tensors["rows/input"][:399])

    lexicon.write_text("\n".join(lexicon.read_text("utf-8").splitlines()[1:]) + "\n", "utf-8")
    other = RunDir(tmp_path / "other")
    with pytest.raises(Stopped):
        train(make_recipe(inputs, changes), other, Stops())
    with pytest.raises(WakeError, match="ids 152064 to 195887, the run's new words are 151665 to 195886: another lexi"):
        keeping.import_pt(other, path)
