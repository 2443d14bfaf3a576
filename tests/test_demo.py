"""The demo's base, text and lexicon: what `train demo` relies on, with a base pretrained for a few steps only."""

import collections
import fcntl
import hashlib
import math
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wake2vec import demo
from wake2vec.errors import WakeError

TINY = replace(
    demo.PRETRAINING,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    steps=4,
    batch_size=2,
    seq_len=32,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts() -> tuple[str, str, list[str]]:
    return demo.make_texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "demo"
    demo.prepare(folder, pretraining=TINY)
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    return (folder / "lexicon.txt").read_text("utf-8").split("\n")[:-1]


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_words_are_in_the_text_whole_rarest_first(folder: Path, words: list[str]) -> None:
    counts = collections.Counter(re.findall(r"\w+", (folder / "text.txt").read_text("utf-8")))
    assert len(words) == len(set(words)) == 300
    assert [counts[word] for word in words] == sorted(counts[word] for word in words)
    assert counts[words[0]] >= 8


def test_words_are_new_to_the_base(folder: Path, words: list[str], texts: tuple[str, str, list[str]]) -> None:
    base_text = texts[0].lower()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert not [word for word in words if word in base_text]
    assert not set(words) & set(tokenizer.get_vocab())
    assert all(len(tokenizer(f" {word}")["input_ids"]) > 1 for word in words)


def test_blends_replace_their_words_everywhere_and_change_nothing_else(texts: tuple[str, str, list[str]]) -> None:
    original = demo.split_paragraphs(demo.english_paragraphs(), 0.4)[1]
    _, blended, words = texts
    before, after = re.split(r"(\w+)", original), re.split(r"(\w+)", blended)
    changed = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert sorted(new for _, new in changed) == sorted(words)
    assert len({old for old, _ in changed}) == len(words)


def test_base_and_text_have_no_paragraph_in_common() -> None:
    paragraphs = demo.english_paragraphs()
    base, text = ({" ".join(p.split()) for p in t.split("\n\n")} for t in demo.split_paragraphs(paragraphs, 0.4))
    assert not base & text
    assert base | text == {" ".join(p.split()) for p in paragraphs}
    assert len(base) > len(text) > 500


def test_text_survives_normalisation_and_line_ends(folder: Path) -> None:
    content = (folder / "text.txt").read_bytes()
    assert unicodedata.normalize("NFC", content.decode("utf-8")) == content.decode("utf-8")
    assert b"\r" not in content


def test_base_loads_untied_with_padding_rows_and_fits_nf4(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(tokenizer) == TINY.vocab_size
    assert table.shape == head.shape == (576, 64)
    assert not torch.equal(table, head)
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear
    assert all(size % 64 == 0 for m in linear[:1] + linear[3:] for size in m.weight.shape)


def test_default_base_has_sizes_in_blocks_of_nf4() -> None:
    config = demo.base_config(demo.PRETRAINING.vocab_size, demo.PRETRAINING)
    head_size = demo.PRETRAINING.hidden_size // demo.PRETRAINING.num_heads
    sizes = [config["hidden_size"], config["intermediate_size"], head_size * demo.PRETRAINING.num_kv_heads]
    assert [size % 64 for size in sizes if isinstance(size, int)] == [0, 0, 0]
    assert config["vocab_size"] == 2112


def test_files_describe_the_model_that_was_trained(folder: Path, texts: tuple[str, str, list[str]]) -> None:
    tokenizer = demo.train_tokenizer(texts[0], TINY.vocab_size)
    ids_K = torch.tensor(tokenizer.encode(texts[0]).ids)
    trained = demo.pretrain(demo.base_config(TINY.vocab_size, TINY), ids_K, TINY, [].append)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids_BT = ids_K[None, :40]
    assert torch.equal(loaded(input_ids=ids_BT).logits, trained.eval()(input_ids=ids_BT).logits)
    assert loaded.generation_config.eos_token_id == AutoTokenizer.from_pretrained(folder / "base").eos_token_id == 511


def test_pretraining_learns(texts: tuple[str, str, list[str]]) -> None:
    tokenizer = demo.train_tokenizer(texts[0], TINY.vocab_size)
    lines: list[str] = []
    ids_K = torch.tensor(tokenizer.encode(texts[0]).ids)
    demo.pretrain(demo.base_config(TINY.vocab_size, TINY), ids_K, replace(TINY, steps=40), lines.append)
    losses = [float(found[1]) for line in lines if (found := re.search(r"loss ([\d.]+)", line))]
    assert len(losses) == 2
    assert losses[-1] < math.log(576) - 0.5


def test_tokenizer_gives_text_back(folder: Path, texts: tuple[str, str, list[str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = tokenizer(texts[1], verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == texts[1]
    assert ids == demo.train_tokenizer(texts[0], TINY.vocab_size).encode(texts[1]).ids


def test_same_folder_twice_and_random_state_untouched(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    demo.prepare(tmp_path / "again", pretraining=TINY)
    assert torch.equal(torch.rand(3), expected)
    assert files_of(tmp_path / "again") == files_of(folder)


def test_prepared_folder_is_left_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo.prepare(folder, pytest.fail, TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):
        demo.prepare(tmp_path / "demo", interrupt, replace(TINY, steps=20))
    assert [path.name for path in tmp_path.iterdir()] == ["demo.lock"]


def test_what_a_killed_build_left_is_not_used(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".demo.building" / "base"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    (left / "strange.json").write_text("half")
    demo.prepare(tmp_path / "demo", pretraining=TINY)
    assert files_of(tmp_path / "demo") == files_of(folder)
    assert not left.exists()


def test_folder_without_all_its_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "text.txt").write_text("kept")
    with pytest.raises(WakeError, match=r"lexicon\.txt, base/config\.json.* missing; remove the folder"):
        demo.prepare(tmp_path / "demo", pretraining=TINY)
    assert (tmp_path / "demo" / "text.txt").read_text() == "kept"


def test_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WakeError, match="cannot be made"):
        demo.prepare(tmp_path / "file" / "demo", pretraining=TINY)


def test_second_process_waits_and_uses_what_the_first_made(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with open(tmp_path / "demo.lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def first_process_ends() -> None:
            shutil.copytree(folder, tmp_path / "demo")
            held.close()

        first_process = threading.Timer(0.3, first_process_ends)

        def say(line: str) -> None:
            lines.append(line)
            first_process.start()

        demo.prepare(tmp_path / "demo", say, replace(TINY, steps=20))
        first_process.join()
    assert len(lines) == 1
    assert "waiting" in lines[0]
    assert files_of(tmp_path / "demo") == files_of(folder)
