"""The report: its numbers against the rows themselves, its schema, and its page in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image
from tiny import NEW, Quiet, make_recipe, run_to_end

from wake2vec import report, sentry, train
from wake2vec.errors import WakeError
from wake2vec.metrics import read_records
from wake2vec.rundir import RunDir
from wake2vec.summary import analyse, summarise

KEPT = {"run": {"keep_every": 6}}
SCHEMA = json.loads((files("wake2vec") / "schemas" / "summary.schema.json").read_text("utf-8"))


def reported(inputs: Path, folder: Path) -> RunDir:
    run = run_to_end(inputs, folder, KEPT)
    report.write(run)
    return run


@pytest.fixture(scope="module")
def untied(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return reported(inputs, tmp_path_factory.mktemp("report") / "untied")


@pytest.fixture(scope="module")
def tied(tied_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return reported(tied_inputs, tmp_path_factory.mktemp("report") / "tied")


def summary_of(run: RunDir) -> dict[str, Any]:
    found = json.loads((run.report / "summary.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_summary_follows_its_schema(kind: str, request: pytest.FixtureRequest) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    summary = summary_of(request.getfixturevalue(kind))
    jsonschema.validate(summary, SCHEMA)
    assert (summary["head"] is None) == summary["tied"] == (kind == "tied")


def test_schema_refuses_a_missing_and_an_unknown_key(untied: RunDir) -> None:
    summary = summary_of(untied)
    for broken in ({**summary, "strange": 1}, {key: value for key, value in summary.items() if key != "norms"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_numbers_are_those_of_the_rows(untied: RunDir) -> None:
    summary = summary_of(untied)
    start, now = (sentry.read(untied.sentry(step)).tensors for step in (0, 12))
    assert (summary["step"], summary["checkpoint"]) == (12, "sentries/sentry_step_000012.safetensors")
    for numbers, name in ((summary, "rows/input"), (summary["head"], "rows/head")):
        rows, before = now[name].double().numpy(), start[name].double().numpy()
        norms = np.linalg.norm(rows, axis=1)
        assert numbers["norms"]["new"]["mean"] == pytest.approx(norms.mean(), rel=1e-6)
        assert numbers["norms"]["new"]["std"] == pytest.approx(norms.std(), rel=1e-5)
        distance = np.linalg.norm(rows - before, axis=1)
        assert numbers["drift"]["l2"]["mean"] == pytest.approx(distance.mean(), rel=1e-5)
        assert numbers["drift"]["most_moved"][0]["word"] == NEW[int(distance.argmax())]
        assert numbers["drift"]["least_moved"][0]["word"] == NEW[int(distance.argmin())]
        assert numbers["isotropy"]["rows"] == len(NEW)
    assert summary["vocab_size"] == summary["base_vocab"] + summary["new_tokens"]


def test_losses_are_those_on_record(untied: RunDir) -> None:
    loss, records = summary_of(untied)["loss"], read_records(untied.metrics)
    assert loss["val_nats"] == [r["val/loss_nats"] for r in records if "val/loss_nats" in r][-1]
    assert loss["best_val_nats"] == min(r["val/loss_nats"] for r in records if "val/loss_nats" in r)
    assert loss["base_bits_per_char"] == records[0]["base/bits_per_char"]
    assert loss["shuffled_bits_per_char"] == records[-1]["control/bits_per_char"]
    assert (untied.report / "loss_table.md").read_bytes() == untied.loss_table.read_bytes()


def test_drift_over_time_begins_at_the_start_and_ends_at_the_newest(untied: RunDir) -> None:
    summary = summary_of(untied)
    for name, numbers in (("input", summary), ("head", summary["head"])):
        curve = summary["drift_over_time"][name]
        steps = sorted(header["step"] for _, header, _ in sentry.listing(untied) if header)
        assert [point["step"] for point in curve] == steps
        assert curve[0]["l2"] == 0
        assert curve[0]["cosine"] == pytest.approx(1)
        assert curve[-1]["l2"] == pytest.approx(numbers["drift"]["l2"]["mean"], rel=1e-5)


@pytest.mark.parametrize("name", ["loss_curve", "drift", "embedding_input", "embedding_head"])
def test_pictures_are_pictures(untied: RunDir, name: str) -> None:
    with Image.open(untied.report / f"{name}.png") as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_tied_run_has_no_head(tied: RunDir) -> None:
    assert sorted(path.name for path in tied.report.glob("*.png")) == [
        "drift.png",
        "embedding_input.png",
        "loss_curve.png",
    ]


WITHOUT = """
import sys
for name in ("transformers", "bitsandbytes", "tokenizers", "accelerate", "peft", "huggingface_hub"):
    sys.modules[name] = None
from pathlib import Path
from wake2vec import report
from wake2vec.rundir import RunDir
from wake2vec.summary import analyse, summarise
print(len(report.write(RunDir(Path(sys.argv[1])))))
"""


@pytest.mark.slow
def test_report_needs_neither_base_model_nor_transformers(untied: RunDir, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(untied.path, run)
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert not Path(record["identity"]["recipe"]["model"]["base"]).is_relative_to(run)
    done = subprocess.run([sys.executable, "-c", WITHOUT, run], capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_same_run_same_numbers(untied: RunDir, tmp_path: Path) -> None:
    before = (untied.report / "summary.json").read_bytes()
    shutil.copytree(untied.path, tmp_path / "untied")
    copy = RunDir(tmp_path / "untied")
    assert summarise(copy, analyse(copy)) == json.loads(before)


def test_a_damaged_sentry_is_passed_over(untied: RunDir, tmp_path: Path) -> None:
    shutil.copytree(untied.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    content = bytearray(run.sentry(12).read_bytes())
    content[-1] ^= 1
    run.sentry(12).write_bytes(content)
    steps = [header["step"] for _, header, _ in sentry.listing(run) if header]
    assert analyse(run).step == steps[1] < steps[0] == 12


def test_without_the_first_sentry_there_is_no_drift(untied: RunDir, tmp_path: Path) -> None:
    shutil.copytree(untied.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    run.sentry(0).unlink()
    report.write(run)
    summary = summary_of(run)
    jsonschema.validate(summary, SCHEMA)
    assert summary["drift"] is None
    assert summary["drift_over_time"] == {}


@pytest.mark.parametrize("missing", ["reference/base.safetensors", "sentries"])
def test_what_is_missing_is_named_and_nothing_is_written(untied: RunDir, tmp_path: Path, missing: str) -> None:
    shutil.copytree(untied.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    shutil.rmtree(run.report)
    target = run.path / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(WakeError, match=rf"run run: .*{missing.split('/')[0]}.*; continue the run"):
        report.write(run)
    assert not run.report.exists()


def test_training_keeps_a_light_page_up_to_date(inputs: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    live = report.LivePage(run)
    pages = []

    class Watched(Quiet):
        def log(self, step: int, values: Any) -> None:
            live(step, values)
            live.scribe.drain()
            if run.report.exists():
                pages.append((run.report / "index.html").read_text("utf-8"))

    train.train(make_recipe(inputs, KEPT), run, Watched())
    live.close()
    assert "Running: step 0 of 12" in pages[0]
    assert "Running: step 5 of 12" in "".join(pages)
    assert page_data(pages[0])["reload_s"] > 0
    assert not report.is_current(run)
    report.write(run)
    assert report.is_current(run)
    whole = (run.report / "index.html").read_text("utf-8")
    assert "Done: step 12 of 12" in whole
    assert page_data(whole)["reload_s"] == 0


def page_data(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match is not None
    data = json.loads(match[1])
    assert isinstance(data, dict)
    return data


def test_a_name_cannot_break_out_of_the_page(untied: RunDir, tmp_path: Path) -> None:
    name = "x</script><script>alert(1)</script>"
    shutil.copytree(untied.path, tmp_path / name.replace("/", "_"))
    data = report._script_json({"word": name})
    assert "<" not in data
    assert json.loads(data) == {"word": name}
    page = report.render(RunDir(tmp_path / name.replace("/", "_")), [])
    assert "<script>alert" not in page


def test_page_asks_for_nothing_from_the_network(untied: RunDir) -> None:
    page = (untied.report / "index.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "<link" not in page.replace('<link rel="icon" href="data:,">', "")


def test_explorer_holds_every_word(untied: RunDir) -> None:
    words = page_data((untied.report / "index.html").read_text("utf-8"))["words"]
    assert words["words"] == NEW
    kept = sentry.read(untied.reference / "word_losses.safetensors").tensors
    expected = (kept["nats"] / kept["counts"]).tolist()
    for shown, loss, count in zip(words["losses"]["after"], expected, kept["counts"].tolist(), strict=True):
        assert shown is None if count == 0 else shown == pytest.approx(loss, abs=1e-4)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def open_page(browser: Any, run: RunDir, **options: Any) -> tuple[Any, list[str]]:
    """Open the report; the list holds every console message, error and request beyond the file itself."""
    page = browser.new_context(**options).new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else heard.append(request.url)
    )
    page.goto((run.report / "index.html").as_uri())
    page.wait_for_selector(".plot svg")
    return page, heard


@browser_only
def test_charts_answer_to_mouse_and_keyboard(browser: Any, untied: RunDir) -> None:
    page, heard = open_page(browser, untied, viewport={"width": 1280, "height": 900})
    assert page.locator(".plot svg").count() == page.locator(".chart").count() >= 18
    plot, values = page.locator(".plot").first, page.locator(".values").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 15, box["y"] + 40)
    loss = next(r for r in read_records(untied.metrics) if r["step"] == 12 and "val/loss_nats" in r)["val/loss_nats"]
    assert f"held out {float(f'{loss:.5g}')}" in values.text_content()
    labels = page.locator(".plot").first.locator("text").all_text_contents()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 60, steps=4)
    page.mouse.up()
    assert page.locator(".plot").first.locator("text").all_text_contents() != labels
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, box["y"] + 40)
    assert page.locator(".plot").first.locator("text").all_text_contents() == labels
    plot.focus()
    page.keyboard.press("Home")
    assert values.text_content().startswith("step 0:")
    page.keyboard.press("ArrowRight")
    assert values.text_content().startswith("step 3:")
    page.keyboard.press("+")
    assert page.locator(".plot").first.locator("text").all_text_contents() != labels
    page.keyboard.press("0")
    assert page.locator(".plot").first.locator("text").all_text_contents() == labels
    assert heard == []


@browser_only
def test_explorer_finds_a_word_by_keyboard(browser: Any, untied: RunDir) -> None:
    page, heard = open_page(browser, untied)
    page.locator("#word").focus()
    page.keyboard.type("ÉTERN")
    assert page.locator("#matches li").all_text_contents() == ["éternité"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#found h3").text_content() == "éternité"
    assert page.locator("#found .near li").count() == 10
    page.locator("#found .near button").first.click()
    assert page.locator("#found h3").text_content() in set(NEW) - {"éternité"}
    page.locator("#word").fill("zzz")
    assert "none of the new words" in page.locator("#matches").text_content()
    assert heard == []


@browser_only
def test_page_fits_a_phone_and_has_two_colour_schemes(browser: Any, untied: RunDir) -> None:
    page, heard = open_page(browser, untied, viewport={"width": 360, "height": 800}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate(colour) != dark
    page.locator("#theme").click()
    assert page.evaluate(colour) == dark
    page.emulate_media(media="print")
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    assert heard == []


@browser_only
def test_live_page_runs_too(browser: Any, untied: RunDir, tmp_path: Path) -> None:
    shutil.copytree(untied.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    run.metrics.write_text("".join(line + "\n" for line in untied.metrics.read_text().splitlines()[:4]))
    report.write_light(run)
    page, heard = open_page(browser, run)
    assert "Looks for news" in page.locator("#beat").text_content()
    assert page.locator("#explorer").count() == 0
    assert heard == []


def test_a_start_of_training_does_not_wait_for_matplotlib() -> None:
    program = "import sys, wake2vec.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
