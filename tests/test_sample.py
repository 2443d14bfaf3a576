"""Texts drawn from a run: the cache against a plain forward, seeds, marks and numbers."""

import json
import sys

import pytest
import torch
from tiny import run_to_end

from wake2vec import cli, sample, tokens
from wake2vec.errors import WakeError
from wake2vec.loss import logits
from wake2vec.rundir import RunDir
from wake2vec.sample import Sampler, Settings

PROMPT = "the riverrun runs past"


@pytest.fixture(scope="module", params=["inputs", "tied_inputs"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_to_end(request.getfixturevalue(request.param), tmp_path_factory.mktemp("sample") / "run")


@pytest.fixture(scope="module")
def sampler(run: RunDir) -> Sampler:
    return Sampler(run, lambda _: None)


def plain_logits(sampler: Sampler, ids: list[int]) -> torch.Tensor:
    """Return the next token's logits from a whole forward, without a cache."""
    with torch.no_grad():
        hidden_BTD = sampler._base.hidden(sampler._overlay(torch.tensor([ids])))
    return logits(hidden_BTD[0, -1:], sampler._base.head_VD, sampler._head_rows)[0]


def test_the_cache_changes_nothing(sampler: Sampler) -> None:
    # top_k = 1: the likeliest token each time
    settings = Settings(1.0, max_new_tokens=12, num_texts=2, top_k=1, repetition_penalty=1.0)
    ids, _ = tokens.encode(sampler._tokenizer, PROMPT)
    drawn = sampler._generate(torch.tensor([ids, ids]), settings, 1)
    assert torch.equal(drawn[0], drawn[1])
    whole = list(ids)
    for token in drawn[0].tolist():
        assert token == int(plain_logits(sampler, whole).argmax())
        whole.append(token)


def test_draws_follow_the_probabilities(sampler: Sampler) -> None:
    settings = Settings(1.0, max_new_tokens=1, num_texts=4000, top_p=1.0, top_k=3, repetition_penalty=1.0)
    ids, _ = tokens.encode(sampler._tokenizer, PROMPT)
    drawn = sampler._generate(torch.tensor([ids] * 4000), settings, 7).flatten()
    top = plain_logits(sampler, ids).topk(3)
    expected = top.values.softmax(0) * 4000
    counts = torch.stack([(drawn == token).sum() for token in top.indices]).float()
    assert int(counts.sum()) == 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 2 degrees of freedom: p = 0.0003


def test_the_same_seed_draws_the_same(sampler: Sampler) -> None:
    settings = Settings(1.2, max_new_tokens=20, num_texts=3)
    first = [text.as_json() for text in sampler.draw(PROMPT, settings, 5)]
    assert first == [text.as_json() for text in sampler.draw(PROMPT, settings, 5)]
    assert first != [text.as_json() for text in sampler.draw(PROMPT, settings, 6)]
    assert len({text["text"] for text in first}) == 3


def test_pieces_are_the_text_and_new_words_are_marked(sampler: Sampler) -> None:
    ids, _ = tokens.encode(sampler._tokenizer, PROMPT)
    drawn, _ = tokens.encode(sampler._tokenizer, " the mill, éternité and swan-song cropse")
    pieces = list(sampler._pieces(ids, drawn))
    assert "".join(piece for piece, _ in pieces) == " the mill, éternité and swan-song cropse"
    assert [piece.strip() for piece, new in pieces if new] == ["éternité", "swan-song", "cropse"]
    assert sampler._numbers(drawn)["new_share"] == pytest.approx(3 / len(drawn))


def test_a_text_ends_at_the_models_end(sampler: Sampler) -> None:
    settings = Settings(1.0, max_new_tokens=10, num_texts=2, top_k=1, repetition_penalty=1.0)
    free = sampler.draw(PROMPT, settings, 1)[0]
    ids, _ = tokens.encode(sampler._tokenizer, PROMPT)
    third = int(sampler._generate(torch.tensor([ids]), settings, 1)[0, 2])
    kept = sampler._stop
    sampler._stop = {third}
    try:
        cut = sampler.draw(PROMPT, settings, 1)[0]
    finally:
        sampler._stop = kept
    assert cut.numbers["tokens"] <= 2
    assert free.numbers["tokens"] == 10


def test_numbers_by_hand() -> None:
    assert sample.distinct([1, 2, 1, 2], 1) == 0.5
    assert sample.distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert sample.distinct([1], 2) == 0
    assert sample.repetition([1, 2, 1, 3]) == 0.25
    assert sample.repetition([1, 2, 1], window=1) == 0


def test_the_battery_is_the_earlier_runs() -> None:
    drawn = [(s.temperature, s.num_texts, s.max_new_tokens) for part in sample.BATTERY.values() for s in part]
    assert [t for t, _, _ in drawn] == [0.9, 0.5, 0.7, 0.9, 1.0, 1.2, 0.9, 1.1]
    assert drawn[-2:] == [(0.9, 3, 256), (1.1, 3, 512)]
    settings = {(s.top_p, s.top_k, s.repetition_penalty) for part in sample.BATTERY.values() for s in part}
    assert settings == {(0.92, 50, 1.15)}


def test_markdown_marks_new_words_and_escapes_the_rest() -> None:
    pieces = [(" a *star*\nand", False), (" riverrun", True)]
    text = sample.Sample("one", "p_1", Settings(0.9), 3, pieces, {"tokens": 5.0, "new_share": 0.2, "repetition": 0.0})
    text.numbers.update({f"distinct_{n}": 1.0 for n in (1, 2, 3)})
    shown = sample.markdown([text, text], "title")
    assert "> p\\_1 a \\*star\\*\n> and **riverrun**" in shown
    assert "| 0.9 | 2 | 5 | 0.200 | 0.000 | 1.000 | 1.000 | 1.000 |" in shown


def test_command(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "wake2vec",
        "sample",
        str(run.path),
        "--temperature",
        "0.9",
        "--max-new-tokens",
        "6",
        "--prompt",
        PROMPT,
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert cli._run() == 0
    found = json.loads(capsys.readouterr().out)
    assert [text["prompt"] for text in found] == [PROMPT]
    assert (run.report / "samples.md").read_text("utf-8").startswith("# run, step 12")
    monkeypatch.setattr(sys, "argv", ["wake2vec", "sample", str(run.path), "--part", "strange"])
    assert cli._run() == 1
    assert "no part strange; use one, sweep, three, long" in capsys.readouterr().err


def test_an_empty_prompt_is_refused(sampler: Sampler) -> None:
    with pytest.raises(WakeError, match="the prompt is empty"):
        sampler.draw("", Settings(1.0), 1)


def test_new_words_are_marked_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from wake2vec import console

    console.print_text("title", "before", [(" old", False), (" new", True)])
    assert capsys.readouterr().out == "title\nbefore old **new**\n\n"
