"""The guard of versions: what moved is named, what is locked passes, and nothing of it needs torch."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker

from wake2vec.environment import Drift, check_same_stack, check_stack, compare, read_lock, stack, summary_block
from wake2vec.errors import WakeError
from wake2vec.machine import Card, Gpus

LOCKED = {"torch": "2.9.0", "transformers": "4.57.6", "huggingface-hub": "0.36.0", "left-pad": "1.0"}
OTHER = {"torch": "2.10.0", "transformers": "5.0.0", "huggingface-hub": "1.4.1", "left-pad": "1.0"}


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / "locks"
    folder.mkdir()
    for name, versions in {"torch2.9-tf4.57": LOCKED, "torch2.10-tf5.0": OTHER}.items():
        lines = [f"{n}=={v} ; sys_platform == 'linux' \\\n    --hash=sha256:{'0' * 64}\n" for n, v in versions.items()]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def install(site: Path, versions: dict[str, str], build: str | None = None) -> Path:
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "WHEEL").write_text("Wheel-Version: 1.0\n" + (f"Build: {build}\n" if build else ""))
    return site


def image(tmp_path: Path, name: str = "torch2.9-tf4.57") -> Path:
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    (prefix / "wake2vec-stack").write_text(name + "\n")
    return prefix


def test_an_environment_as_locked_passes(tmp_path: Path, locks: Path) -> None:
    report = stack(tmp_path, [str(install(tmp_path / "site", LOCKED))], locks)
    assert (report.name, report.locked, report.image, bool(report.drift)) == (
        "torch2.9-tf4.57",
        "torch2.9-tf4.57",
        False,
        False,
    )
    assert check_stack(report, allow=False) is report


@pytest.mark.parametrize("moved", [name for name in LOCKED if name != "torch"])
def test_a_moved_version_is_refused_with_both_versions(tmp_path: Path, locks: Path, moved: str) -> None:
    site = install(tmp_path / "site", {**LOCKED, moved: "9.9.9"})
    report = stack(image(tmp_path), [str(site)], locks)
    with pytest.raises(WakeError, match=f"{moved}: the lock has {LOCKED[moved]}, installed is 9.9.9"):
        check_stack(report, allow=False)
    allowed = check_stack(report, allow=True)
    assert allowed.as_dict()["drift"] == {"moved": [[moved, LOCKED[moved], "9.9.9"]], "missing": [], "extra": []}


def test_every_difference_stands_in_one_message(tmp_path: Path, locks: Path) -> None:
    site = install(tmp_path / "site", {"torch": "2.9.1", "transformers": "4.57.6", "left-pad": "1.0", "new": "3"})
    with pytest.raises(WakeError) as caught:
        check_stack(stack(image(tmp_path), [str(site)], locks), allow=False)
    assert str(caught.value).splitlines()[1:] == [
        "  torch: the lock has 2.9.0, installed is 2.9.1",
        "  huggingface-hub: the lock has 0.36.0, not installed",
        "  new: not in the lock, installed is 3",
    ]


def test_a_developer_may_have_more_the_image_may_not(tmp_path: Path, locks: Path) -> None:
    site = str(install(tmp_path / "site", {**LOCKED, "pytest": "9", "wake2vec": "0.1"}))
    assert not stack(tmp_path, [site], locks).drift
    assert stack(image(tmp_path), [site], locks).drift == Drift(extra=(("pytest", "9"),))


def test_the_images_test_stage_is_held_to_its_own_list(tmp_path: Path, locks: Path) -> None:
    prefix = image(tmp_path)
    (prefix / "wake2vec-lock.txt").write_text((locks / "torch2.9-tf4.57.txt").read_text() + "pytest==9\n")
    site = str(install(tmp_path / "site", {**LOCKED, "pytest": "9"}))
    report = stack(prefix, [site], locks)
    assert not report.drift
    assert report.lock_sha256 == stack(tmp_path, [site], locks).lock_sha256


def test_one_version_laid_over_another_is_seen(tmp_path: Path, locks: Path) -> None:
    site = install(tmp_path / "site", {**LOCKED, "huggingface_hub": "0.35.0"})
    drift = stack(image(tmp_path), [str(site)], locks).drift
    assert drift.moved == (("huggingface-hub", "0.36.0", "0.35.0 and 0.36.0"),)


def test_a_rebuilt_wheel_of_the_same_version_is_seen(tmp_path: Path, locks: Path) -> None:
    others = {name: version for name, version in LOCKED.items() if name != "torch"}
    site = install(install(tmp_path / "site", others), {"torch": "2.9.0"}, build="3")
    assert stack(tmp_path, [str(site)], locks).drift.moved == (("torch", "2.9.0", "2.9.0 (build 3)"),)


def test_versions_of_no_stack_have_no_name_but_a_nearest_one(tmp_path: Path, locks: Path) -> None:
    site = install(tmp_path / "site", {**OTHER, "torch": "2.11.0"})
    report = stack(tmp_path, [str(site)], locks)
    assert (report.name, report.locked) == (None, "torch2.10-tf5.0")
    with pytest.raises(WakeError, match=r"not the locked stack torch2\.10-tf5\.0"):
        check_stack(report, allow=False)


def test_the_variable_allows_drift(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = stack(image(tmp_path), [str(install(tmp_path / "site", {**LOCKED, "left-pad": "2"}))], locks)
    monkeypatch.setenv("WAKE2VEC_ALLOW_DRIFT", "")  # what compose passes for an unset one
    with pytest.raises(WakeError, match="left-pad"):
        check_stack(report)
    monkeypatch.setenv("WAKE2VEC_ALLOW_DRIFT", "1")
    assert check_stack(report).drift.moved
    monkeypatch.setenv("WAKE2VEC_ALLOW_DRIFT", "maybe")
    with pytest.raises(WakeError, match="neither 1 nor 0"):
        check_stack(report)


def test_a_run_crosses_stacks_only_when_told(tmp_path: Path, locks: Path) -> None:
    before = stack(tmp_path, [str(install(tmp_path / "a", LOCKED))], locks)
    after = stack(tmp_path, [str(install(tmp_path / "b", OTHER))], locks)
    assert check_same_stack({**before.versions, "python": "3.11.0"}, before, allow=False) == []
    with pytest.raises(WakeError, match=r"torch: 2.9.0 -> 2.10.0\n  transformers: 4.57.6 -> 5.0.0"):
        check_same_stack(before.versions, after, allow=False)
    changed = ["torch: 2.9.0 -> 2.10.0", "transformers: 4.57.6 -> 5.0.0", "huggingface-hub: 0.36.0 -> 1.4.1"]
    assert check_same_stack(before.versions, after, allow=True) == changed


CLAUSES = [
    f"python_full_version {operator} '3.{sys.version_info[1] + minor}'"
    for operator in (">=", "<")
    for minor in (-1, 0, 1)
] + ["sys_platform == 'linux'", "sys_platform == 'win32'", "platform_python_implementation != 'PyPy'"]


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("other", CLAUSES)
def test_markers_choose_as_packaging_does(tmp_path: Path, clause: str, other: str) -> None:
    marker = f"{clause} and {other} and platform_machine == '{platform.machine()}'"
    file = tmp_path / "list.txt"
    file.write_text(f"a==1 ; {marker} \\\n    --hash=sha256:{'0' * 64}\n")
    assert bool(read_lock(file)) == Marker(marker).evaluate()


def test_compare_is_empty_only_where_nothing_differs() -> None:
    assert not compare(LOCKED, {name: {version} for name, version in LOCKED.items()}, exact=True)
    assert compare(LOCKED, {}, exact=False).missing == tuple(sorted(LOCKED.items()))


def test_the_summary_names_machine_card_and_stack(tmp_path: Path, locks: Path) -> None:
    report = stack(tmp_path, [str(install(tmp_path / "site", LOCKED))], locks)
    block = summary_block(report, Gpus((Card("NVIDIA T4", 16 * 2**30, (7, 5)),), "570.86.15"))
    assert "gpu      NVIDIA T4, 16.0 GiB, compute 7.5" in block
    assert "stack    torch2.9-tf4.57, as locked" in block
    assert "transformers 4.57.6" in block


def test_the_guard_imports_no_torch() -> None:
    script = "import sys, wake2vec.environment as e; e.summary_block(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_this_environment_is_as_locked() -> None:
    report = stack()
    assert report.name is not None
    assert report.drift.lines() == []
    assert report.cuda == "12.8"
