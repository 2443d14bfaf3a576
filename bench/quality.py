"""Compare ways of training new words' rows by bits per character of held-out text, on text that Python carries.

    python bench/quality.py --out FOLDER                 on a card
    python bench/quality.py --small --out FOLDER         on a CPU: smaller model, fewer steps
    python bench/quality.py --text BOOK --out FOLDER     the two halves of a book in place of Python's text
    python bench/quality.py --draw FOLDER                table and plot again from FOLDER/quality.jsonl

The text is the standard library's docstrings and Python's help topics, dealt out by module into two halves without a
common paragraph. A small model, untied or tied, is pretrained on the first half; the lower-case words of the second
half that the first does not hold are added, rarest first; their rows are trained on nine tenths of the second half and
scored on the rest, the same rest for every seed. A seed decides the pretraining, the start rows and the order of the
blocks. One change a way, from the earlier script's to the package's; all but what a way changes is the qwen14b recipe:
Adafactor, 5e-4, 16 x 128 tokens a step, warm-up and cosine, clipped at 1.0, start rows 1.5 base radii long (subword
means 1.0, as in the recipes that start from them).

Prints JSON lines; with --out also quality.jsonl, quality.md and, where matplotlib is installed, quality.png.

Shapes: K tokens of a text, V base tokens, D hidden size.
"""

import argparse
import ast
import collections
import concurrent.futures
import hashlib
import inspect
import json
import math
import multiprocessing
import platform
import re
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from wake2vec import base, demo, tokens
from wake2vec.config import DataSection, TokensSection, TrainSection
from wake2vec.data import Blocks, Split, batch_indices, make_blocks, read_text, split_text
from wake2vec.evaluate import evaluate
from wake2vec.model import WakeModel
from wake2vec.optimizer import clip_scale, grad_norm, make_optimizer
from wake2vec.plan import Plan
from wake2vec.rows import start_rows
from wake2vec.schedule import learning_rate_at

BASE = "base model, its own tokenizer"
SEQ_LEN = DataSection.model_fields["seq_len"].default
BATCH_SIZE = TrainSection.model_fields["batch_size"].default
MAX_GRAD_NORM = TrainSection.model_fields["max_grad_norm"].default
RATE = TrainSection.model_fields["learning_rate"].default
START_RADIUS = TokensSection.model_fields["start_radius"].default
SPLIT_SEED, VAL_FRACTION = 42, 0.1
PLAN = Plan(BATCH_SIZE, "kept", chunk_tokens=2048)
WORD = re.compile(r"(?<![\w'-])[a-z]{3,}(?![\w'-])")
# Not in every distribution's Python, or no English.
LEFT_OUT = {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "test", "this", "tkinter", "turtledemo"}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    pretraining: demo.Pretraining
    row_steps: int


FULL = Size(
    demo.Pretraining(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        steps=800,
        batch_size=16,
        learning_rate=2e-3,
    ),
    row_steps=400,
)
SMALL = Size(
    demo.Pretraining(
        hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1, steps=300, learning_rate=5e-3
    ),
    row_steps=60,
)


@dataclass(frozen=True)
class Way:
    """A way to give a model new words."""

    name: str
    head_rows: Literal["frozen", "shared", "own"]
    """Random and never trained; the input rows; a trained set (a tied model has only one: its input rows)."""
    start: Literal["sphere", "subword-mean"] = "sphere"
    start_radius: float = START_RADIUS
    retied: bool = False
    """The model's own head is thrown away and its input table scores in its place."""
    rate: float = RATE
    match: Literal["word", "substring"] = "substring"
    on_tied: bool = True
    """False where it is the same as another way on a tied model."""


WAYS = (
    Way("earlier script (re-tied head, frozen random head rows)", "frozen", retied=True),
    Way("own head, frozen random head rows", "frozen", on_tied=False),
    Way("own head, one shared row set in and out", "shared"),
    Way("own head, own head rows, sphere start", "own", on_tied=False),
    Way("the same, subword-mean start", "own", "subword-mean", 1.0),
    Way("the same, learning rate 2e-3", "own", "subword-mean", 1.0, rate=2e-3),
    Way("the same, whole-word matching", "own", "subword-mean", 1.0, rate=2e-3, match="word"),
)


def halves(book: Path | None) -> tuple[str, str]:
    """Return the halves of a book, or of Python's text: largest module first, each goes to the shorter half."""
    if book is not None:
        text = read_text(book)
        middle = text.index("\n", len(text) // 2) + 1
        return text[:middle], text[middle:]
    texts = {"topics": demo.english_paragraphs()}
    seen: set[str] = set()
    for module, paragraph in _docstring_paragraphs():
        key = " ".join(paragraph.split())
        if key not in seen:
            seen.add(key)
            texts.setdefault(module, []).append(paragraph)
    parts = sorted(
        ("\n\n".join(paragraphs) + "\n\n" for paragraphs in texts.values()), key=lambda part: (-len(part), part)
    )
    both = ["", ""]
    for part in parts:
        both[len(both[0]) > len(both[1])] += part
    return both[0], both[1]


def _docstring_paragraphs() -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of the standard library's docstrings, each with its top-level module."""
    library = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or LEFT_OUT & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes of old modules
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
            for paragraph in re.split(r"\n\s*\n", docstring or ""):
                if paragraph.strip():
                    yield parts[0], paragraph.strip("\n")


@dataclass(frozen=True)
class Material:
    """What every way starts from: the text and the base tokenizer."""

    base_text: str
    split: Split
    words: list[str]
    """Rarest first."""
    tokenizer: PreTrainedTokenizerFast

    def blocks(self, tokenizer: PreTrainedTokenizerFast) -> tuple[Blocks, Blocks]:
        """Return the blocks to train on and those held out."""
        first, second = (
            make_blocks(*tokens.encode(tokenizer, text), SEQ_LEN, None)
            for text in (self.split.train_text, self.split.val_text)
        )
        return first, second


def prepare_material(vocab_size: int, book: Path | None = None) -> Material:
    """Split the text, choose the words and train the base tokenizer."""
    base_text, text = halves(book)
    old = set(WORD.findall(base_text))
    counts = collections.Counter(word for word in WORD.findall(text) if word not in old)
    tokenizer = demo.train_tokenizer(base_text, vocab_size)
    end_of_text = tokenizer.id_to_token(tokenizer.get_vocab_size() - 1)
    return Material(
        base_text,
        split_text(text, VAL_FRACTION, SPLIT_SEED),
        sorted(counts, key=lambda word: (counts[word], word)),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end_of_text, pad_token=end_of_text),
    )


def pretrain(material: Material, size: Size, *, tied: bool, seed: int, device: torch.device) -> base.FrozenBase:
    """Pretrain a base model on the first half."""
    ids_K = torch.tensor(tokens.encode(material.tokenizer, material.base_text)[0], device=device)
    config = demo.base_config(len(material.tokenizer), size.pretraining) | {"tie_word_embeddings": tied}
    model = demo.pretrain(config, ids_K, replace(size.pretraining, seed=seed), lambda _: None)
    frozen = base.freeze(model, len(material.tokenizer), "pretrained here")
    assert frozen.tied is tied
    return frozen


def make_model(way: Way, frozen: base.FrozenBase, pieces: list[list[int]], seed: int) -> WakeModel:
    """Give a base model rows for the new words."""
    head_VD = frozen.table_VD if way.retied else frozen.head_VD
    shared = way.head_rows == "shared" or (frozen.tied and way.head_rows == "own")
    tables = {"input": frozen.table_VD} if shared else {"input": frozen.table_VD, "head": head_VD}
    rows = start_rows(way.start, tables, pieces, start_radius=way.start_radius, seed=seed)
    return WakeModel(replace(frozen, head_VD=head_VD, tied=shared), rows, PLAN)


def train_rows(model: WakeModel, way: Way, blocks: Blocks, num_steps: int, seed: int) -> None:
    """Train a model's rows, the head's too unless the way leaves them as they are."""
    trained = {name: rows for name, rows in model.rows.items() if name == "input" or way.head_rows != "frozen"}
    optimizer = make_optimizer("adafactor", trained)
    ids_KT = blocks.ids_KT.to(model.base.device)
    for step in range(1, num_steps + 1):
        indices = batch_indices(step, batch_size=BATCH_SIZE, num_blocks=len(ids_KT), seed=seed)
        num_scored = int((blocks.ids_KT[indices, 1:] >= 0).sum())
        model.zero_grad()
        model.backward(ids_KT[indices])
        norm = grad_norm(trained.values()) / num_scored
        rate = learning_rate_at(step, learning_rate=way.rate, warmup_steps=num_steps // 20, max_steps=num_steps)
        optimizer.step(rate, clip_scale(norm, MAX_GRAD_NORM) / num_scored)


def try_way(way: Way, material: Material, frozen: base.FrozenBase, num_steps: int, seed: int) -> dict[str, Any]:
    """Train one way and score it."""
    added = tokens.add_words(material.tokenizer, material.words, way.match)
    pieces = tokens.subword_pieces(material.tokenizer, added.words)
    train_blocks, val_blocks = material.blocks(added.tokenizer)
    model = make_model(way, frozen, pieces, seed)
    train_rows(model, way, train_blocks, num_steps, seed)
    losses = evaluate(
        model.token_losses,
        val_blocks,
        first_new_id=added.first_new_id,
        batch_size=64,
        device=frozen.device,
        ids_device=frozen.device,
    )
    return {
        "way": way.name,
        **losses,
        "uniform_nats": math.log(len(added.tokenizer)),
        "num_new_tokens": len(added.words),
        "new_share_of_val_tokens": _share_of_new(val_blocks, added.first_new_id),
    }


def _share_of_new(blocks: Blocks, first_new_id: int) -> float:
    return int((blocks.ids_KT[:, 1:] >= first_new_id).sum()) / blocks.num_scored


def score_base(material: Material, frozen: base.FrozenBase) -> dict[str, Any]:
    """Score the base model without new words: the number to beat."""
    _, val_blocks = material.blocks(material.tokenizer)
    rows = {"input": frozen.table_VD[:1]} if frozen.tied else {"input": frozen.table_VD[:1], "head": frozen.head_VD[:1]}
    model = WakeModel(frozen, rows, PLAN)
    vocab_size = len(material.tokenizer)
    losses = evaluate(
        model.base_token_losses,
        val_blocks,
        first_new_id=vocab_size,
        batch_size=64,
        device=frozen.device,
        ids_device=frozen.device,
    )
    return {"way": BASE, **losses, "uniform_nats": math.log(vocab_size)}


def try_all_ways(size: Size, tied: bool, seed: int, device: str, book: Path | None) -> list[dict[str, Any]]:
    """Pretrain one base model and try every way on it; each result goes to stderr at once."""
    if device == "cpu":
        torch.set_num_threads(1)
    material = prepare_material(size.pretraining.vocab_size, book)
    started = time.perf_counter()
    frozen = pretrain(material, size, tied=tied, seed=seed, device=torch.device(device))
    results = []
    for way in (None, *WAYS):
        if way is not None and tied and not way.on_tied:
            continue
        result = score_base(material, frozen) if way is None else try_way(way, material, frozen, size.row_steps, seed)
        results.append({"tied": tied, "seed": seed, **result, "seconds": round(time.perf_counter() - started, 1)})
        print(
            f"{'' if tied else 'un'}tied, seed {seed}, {result['way']}: {result['val/bits_per_char']:.3f} bits/char, "
            f"{results[-1]['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
        started = time.perf_counter()
    return results


def describe(size: Size, device: str, book: Path | None) -> dict[str, Any]:
    """Return what the numbers were measured with and on."""
    material = prepare_material(size.pretraining.vocab_size, book)
    text = material.base_text + material.split.train_text + material.split.val_text
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "text": "docstrings and help topics" if book is None else book.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "base_chars": len(material.base_text),
        "train_chars": len(material.split.train_text),
        "val_chars": len(material.split.val_text),
        "num_words": len(material.words),
        "pretraining": vars(size.pretraining),
        "row_steps": size.row_steps,
    }


def run(size: Size, seeds: int, device: str, jobs: int, book: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the description and every result; each base model and its ways are one job."""
    yield describe(size, device, book)
    todo = [(tied, seed) for seed in range(1, seeds + 1) for tied in (False, True)]
    if jobs == 1:
        for tied, seed in todo:
            yield from try_all_ways(size, tied, seed, device, book)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(try_all_ways, size, tied, seed, device, book) for tied, seed in todo]
        for job in concurrent.futures.as_completed(running):
            yield from job.result()


def _collect(results: list[dict[str, Any]], tied: bool, key: str) -> dict[str, list[float]]:
    """Return a number of each way, one a seed, in the table's order."""
    names = [BASE, *(way.name for way in WAYS)]
    values = {name: [r[key] for r in results if r["tied"] is tied and r["way"] == name] for name in names}
    return {name: numbers for name, numbers in values.items() if numbers}


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table: mean (smallest..largest) over the seeds."""
    lines = [
        "| way | untied: bits/char | val nats (uniform) | tied: bits/char | val nats (uniform) |",
        "| --- | --- | --- | --- | --- |",
    ]
    columns = [
        [_collect(results, tied, key) for key in ("val/bits_per_char", "val/loss_nats", "uniform_nats")]
        for tied in (False, True)
    ]
    for name in (BASE, *(way.name for way in WAYS)):
        cells = []
        for bits, nats, uniform in columns:
            if name not in bits:
                cells += ["", ""]
                continue
            cells.append(f"{statistics.mean(bits[name]):.3f} ({min(bits[name]):.3f}..{max(bits[name]):.3f})")
            cells.append(f"{statistics.mean(nats[name]):.2f} ({statistics.mean(uniform[name]):.2f})")
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", "Mean (smallest..largest) over the seeds. Blank: on a tied base the same way as the row above."]
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot mean and spread of each way; what lies far off the base model's number stands at the edge."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 3.6), sharey=True, layout="constrained")
    names = [BASE, *(way.name for way in WAYS)]
    for axis, tied in zip(axes, (False, True), strict=True):
        bits = _collect(results, tied, "val/bits_per_char")
        base_bits = statistics.mean(bits[BASE])
        edge = max(v for values in bits.values() for v in values if v < 1.3 * base_bits) + 0.02 * base_bits
        for name, values in bits.items():
            mean, y = statistics.mean(values), -names.index(name)
            shown = min(mean, edge)
            axis.plot([min(*values, edge), min(max(values), edge)], [y, y], color="tab:blue", linewidth=3, alpha=0.4)
            axis.plot(shown, y, ">" if mean > edge else "o", color="tab:blue")
            axis.annotate(f"{mean:.3f}", (shown, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.axvline(base_bits, color="gray", linewidth=1, linestyle="--")
        axis.set(
            title="tied base" if tied else "untied base", xlabel="bits per character, held-out text (lower is better)"
        )
        axis.set_yticks([-i for i in range(len(names))], names)
        axis.margins(y=0.12)
    figure.savefig(path, dpi=150)


def write_files(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the records, their table and, where matplotlib is installed, the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    results = [record for record in records if "way" in record]
    (folder / "quality.md").write_text(table(results), "utf-8")
    try:
        draw(results, folder / "quality.png")
    except ImportError:
        print("no matplotlib: no plot; draw it later with --draw", file=sys.stderr)


def measure(options: argparse.Namespace) -> None:
    """Run every job; print each result as it comes, then write the files."""
    records = []
    jobs = options.jobs or (2 * options.seeds if options.device == "cuda" else 1)
    size = SMALL if options.small else FULL
    for record in run(size, options.seeds, options.device, jobs, options.text):
        print(json.dumps(record), flush=True)
        records.append(record)
    if options.out:
        write_files(options.out, records)
    print(table([record for record in records if "way" in record]), file=sys.stderr)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="smaller model, fewer steps: for a CPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, help="base models at a time, a process each; default: all on a card, else 1"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, metavar="BOOK", help="UTF-8; default: what Python carries")
    parser.add_argument("--out", type=Path, help="folder for quality.jsonl, .md and .png")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="table and plot from its quality.jsonl")
    options = parser.parse_args()
    if options.draw:
        lines = (options.draw / "quality.jsonl").read_text("utf-8").splitlines()
        write_files(options.draw, [json.loads(line) for line in lines])
        return
    measure(options)


if __name__ == "__main__":
    main()
