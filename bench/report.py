"""Time and peak memory of a report at full size, on random rows: no model, no GPU.

python bench/report.py FOLDER [--words 44223] [--vocab 151665] [--dim 5120]

Makes a run of that size in FOLDER (three sentries of 1.8 GB by default) unless it is there, and reports it in a process
of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from wake2vec import reference, sentry
from wake2vec.environment import stack
from wake2vec.machine import machine
from wake2vec.record import digest
from wake2vec.rundir import RunDir, make_folder, write_json
from wake2vec.tables import encode_json

STEPS = (0, 1500, 3000)
BASE_STD, START_STD, STEP_STD = 0.02, 0.03, 0.005


def identity_of(words: int, vocab: int) -> dict[str, Any]:
    """Return a run's identity with made-up hashes."""
    train = {"optimizer": "adafactor", "learning_rate": 5e-4, "batch_size": 16, "max_steps": 3000, "warmup_steps": 150}
    recipe = {
        "phase": "rows",
        "model": {"base": "random", "quantization": "nf4", "compute_dtype": "bfloat16"},
        "tokens": {"lexicon": "none", "match": "word", "start": "sphere", "start_radius": 1.5},
        "data": {"text": "none", "seq_len": 128},
        "train": {**train, "seed": 42},
        "run": {},
    }
    return {
        "recipe": recipe,
        "base": {"name": "random", "commit": "none"},
        "lexicon_sha256": "0" * 64,
        "text_sha256": "0" * 64,
        "split": {"sha256": "0" * 64, "val_chars": 1, "train_chars": 1},
        "seed": 42,
        "base_vocab_size": vocab,
        "num_new_tokens": words,
        "num_train_blocks": 1,
        "num_known_words": 0,
    }


def make_run(run: RunDir, words: int, vocab: int, dim: int) -> None:
    """Write a finished untied run of random rows."""
    for folder in (run.sentries, run.reference):
        make_folder(folder)
    identity = identity_of(words, vocab)
    header = {"format": sentry.FORMAT, "step": 0, "identity": digest(identity)}
    rows = {f"rows/{name}": torch.randn(words, dim) * START_STD for name in ("input", "head")}
    for step in STEPS:
        sentry.write(run.sentry(step), rows, {**header, "step": step})
        for rows_ND in rows.values():
            rows_ND += torch.randn(words, dim) * STEP_STD
    del rows
    pca_rows = reference.num_pca_rows(words, vocab, dim)
    counts = torch.ones(words, dtype=torch.int64)
    kept = {"words": encode_json([f"word{i}" for i in range(words)]), "train_counts": counts, "val_counts": counts}
    for name in ("input", "head"):
        table_VD = (torch.randn(vocab, dim) * BASE_STD).bfloat16()
        started = time.monotonic()
        found = reference._base_statistics(table_VD, pca_rows)
        print(f"base statistics of the {name} table, as train takes them once: {time.monotonic() - started:.1f} s")
        kept |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    extra = {"machine": machine(), "tables": ["input", "head"], "pca_rows": pca_rows}
    sentry.write(run.reference / "base.safetensors", kept, {**header, **extra})
    near = {
        "base_ids": torch.randint(0, vocab, (words, 5)),
        "new_ids": torch.randint(0, words, (words, 5)),
        "base_cosines": torch.rand(words, 5),
        "new_cosines": torch.rand(words, 5),
    }
    near["base_tokens"] = encode_json({i: f"token{i}" for i in near["base_ids"].unique().tolist()})
    sentry.write(run.reference / "neighbours.safetensors", near, {**header, "step": STEPS[-1]})
    for name in ("word_losses_start", "word_losses"):
        losses = {"nats": torch.rand(words), "counts": counts}
        sentry.write(run.reference / f"{name}.safetensors", losses, {**header, "step": STEPS[-1]})
    lines = [{"step": step, "val/loss_nats": 9.0 - step / 1000, "val/bits_per_char": 2.0} for step in STEPS]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"format": 1, "run": run.name, "created": "now", "wake2vec": "bench", "identity": identity, "history": []}
    write_json(run.identity, {**record, "identity_sha256": digest(identity), "stack": stack().as_dict()})


def main() -> None:
    """Make the run and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", type=int, default=44_223)
    parser.add_argument("--vocab", type=int, default=151_665)
    parser.add_argument("--dim", type=int, default=5120)
    options = parser.parse_args()
    run = RunDir(options.folder)
    if not run.identity.exists():
        make_run(run, options.words, options.vocab, options.dim)
    started = time.monotonic()
    command = "import sys; from wake2vec.cli import _run; sys.exit(_run())"
    subprocess.run([sys.executable, "-c", command, "report", str(run.path)], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"report: {time.monotonic() - started:.1f} s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
