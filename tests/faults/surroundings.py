"""Promise: clocks, time zones, read-only volumes, other users, limits, permissions and odd names lose nothing."""

import os
import shutil
import subprocess
from pathlib import Path

from faults import hooks
from faults.lab import DONE, STEPS, Lab, newest_step, no_traceback, refused
from faults.volume import need, volume

from wake2vec.rundir import RunDir

_STRANGER = 4242


def surroundings(lab: Lab, count: int) -> str:
    """Run in every surrounding; each is a check of its own."""
    checks = [_clock, _time_zones, _read_only, _other_user, _file_limit, _quota, _small_volume, _no_permission, _names]
    for _ in range(count):
        for check in checks:
            check(lab)
    return f"{count} times " + ", ".join(check.__name__.strip("_").replace("_", " ") for check in checks)


def _clock(lab: Lab) -> None:
    """The clock jumps by years, forwards and back, at every look; saves an hour apart stay so."""
    jumping = (hooks.jumping_clock, ())
    lab.train_to_end(lab.fresh(), prepare=[jumping])
    seldom = ("run.sentry_every=1000", "run.sentry_min_gap_s=3600.0", "run.sentry_max_gap_s=3600.0")
    saved = []
    for clock in ([], [jumping]):
        acks = lab.fresh() / "acks"
        sets = [word for pair in seldom for word in ("--set", pair)]
        done = lab.train(lab.fresh(), *sets, prepare=[(hooks.acknowledge, (acks,)), *clock]).wait()
        assert done.code == DONE, done
        saved.append(acks.read_text().split())
    assert saved[0] == saved[1], f"saved after {saved[0]}, under a jumping clock after {saved[1]}"


def _time_zones(lab: Lab) -> None:
    runs = lab.fresh()
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago", "nonsense"):
        done = lab.train(runs, environment={"TZ": zone, "LC_ALL": "C"}, prepare=[(hooks.stop_soon, (0.4,))]).wait()
        no_traceback(done)
    lab.train_to_end(runs)
    listed = lab.run("sentries", "tiny", "--runs", runs, environment={"TZ": "Pacific/Kiritimati"})
    assert listed.code == DONE, listed


def _read_only(lab: Lab) -> None:
    """A volume that can only be read: no new run, a run that is there can be listed, nothing is changed."""
    with volume(lab.fresh(), "ext4") as on:
        runs = on.path / "runs"
        lab.train_to_end(runs)
        on.mount("remount", "ro")
        refused(lab.train(runs).wait(), "Read-only file system")
        refused(lab.run("train", lab.recipe, "--runs", runs, "--run", "other"), "Read-only file system")
        refused(lab.run("sentries", "tiny", "--runs", runs, "--prune"), "Read-only file system")
        listed = lab.run("sentries", "tiny", "--runs", runs, "--json")
        assert listed.code == DONE, listed
        assert listed.out.count("verified") == len(list(RunDir(runs / "tiny").sentries.iterdir())), listed
        on.mount("remount", "rw")


def _other_user(lab: Lab) -> None:
    """Another user's run is refused and left as it is."""
    runs = lab.fresh()
    lab.train_to_end(runs)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    _give_away(runs / "tiny")
    os.chown(runs, _STRANGER, _STRANGER)
    runs.chmod(0o755)
    plain = [(hooks.without_capabilities, ())]
    refused(lab.train(runs, prepare=plain).wait(), "Permission denied", "owner")
    new = lab.run("train", lab.recipe, "--runs", runs, "--run", "new", prepare=plain)
    refused(new, "Permission denied", "check the volume and its owner")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def _give_away(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _STRANGER, _STRANGER)
        path.chmod(0o700 if path.is_dir() else 0o600)


def _no_permission(lab: Lab) -> None:
    """A text that may not be read, a folder that may not be written."""
    runs, folder = lab.fresh(), lab.fresh()
    text = folder / "text.txt"
    shutil.copy(lab.inputs / "text.txt", text)
    _give_away(folder)
    folder.chmod(0o755)
    plain = [(hooks.without_capabilities, ())]
    refused(lab.train(runs, "--set", f'data.text="{text}"', prepare=plain).wait(), "Permission denied", "text.txt")
    assert list(runs.iterdir()) == [], "something was left behind"
    refused(lab.train(folder / "runs", prepare=plain).wait(), "Permission denied")
    lab.train_to_end(runs, prepare=plain)


def _file_limit(lab: Lab) -> None:
    """No file may grow beyond a limit that no sentry fits: the run ends with a message."""
    runs = lab.fresh()
    done = lab.train(runs, prepare=[(hooks.limit_files, (4000,))]).wait()
    refused(done, "not saved (File too large)")
    assert newest_step(RunDir(runs / "tiny")) == -1
    lab.train_to_end(runs)


def _quota(lab: Lab) -> None:
    """A quota that is reached in the middle of a run, which goes on; others that are too small from the start."""
    with volume(lab.fresh(), "btrfs") as on:
        _btrfs("quota", "enable", on.path)

        def limit(size: str, runs: Path) -> None:
            group = _btrfs("inspect-internal", "rootid", runs).strip()
            _btrfs("qgroup", "limit", size, f"0/{group}", on.path)  # by the folder's name the quota forbids it

        runs = on.path / "middle"
        _btrfs("subvolume", "create", runs)
        started = lab.train(runs, prepare=[(hooks.slow_steps, (0.1,))])
        started.wait_for("step 4: train")
        limit("64K", runs)
        started.wait_for("not saved (Disk quota exceeded")
        limit("none", runs)
        done = started.wait()
        assert done.code == DONE, done
        lab.check_end(RunDir(runs / "tiny"))

        for size in ("32K", "200K", "800K"):  # not begun, a few saves, the report
            runs = on.path / size
            _btrfs("subvolume", "create", runs)
            limit(size, runs)
            done = lab.train(runs).wait()
            no_traceback(done)
            assert "Disk quota exceeded" in done.err, done
            limit("none", runs)
            lab.train_to_end(runs)


def _btrfs(*words: str | Path) -> str:
    need("btrfs")
    done = subprocess.run(["btrfs", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout


def _small_volume(lab: Lab) -> None:
    """A volume without room for the sentries is refused before anything is begun."""
    with volume(lab.fresh(), "ext4", mib=4) as on:
        refused(lab.train(on.path / "runs").wait(), "GiB free, the run's sentries need")
        assert not (on.path / "runs" / "tiny").exists()


def _names(lab: Lab) -> None:
    """Spaces, Unicode, quotes and line ends in every path."""
    folder = lab.fresh() / "a b 'c' \"d\" \u00e9\u4e2d\U0001f4a7 \\n"
    shutil.copytree(lab.inputs, folder / "in puts \u00fc")
    recipe = folder / "re cipe \u00df.toml"
    here = str(folder / "in puts \u00fc").replace("\\", "\\\\").replace('"', '\\"')
    recipe.write_text(lab.recipe.read_text().replace(str(lab.inputs), here))
    done = lab.run("train", recipe, "--runs", folder / "r u n s", "--run", "\u00c9ire-1")
    assert done.code == DONE, done
    run = RunDir(folder / "r u n s" / "\u00c9ire-1")
    assert newest_step(run) == STEPS
    listed = lab.run("sentries", "\u00c9ire-1", "--runs", folder / "r u n s", "--prune")
    assert listed.code == DONE, listed
    refused(lab.run("train", recipe, "--runs", Path("runs"), cwd=folder), "run name")
