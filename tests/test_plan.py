"""Plans: what each takes, measured on a card, and which is chosen."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_recipe
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from wake2vec import planner, resume
from wake2vec.config import parse_size
from wake2vec.errors import WakeError
from wake2vec.plan import Plan, Work, estimate, read_work
from wake2vec.planner import choose_plan, leaner_plan, leanest, make_plan

GIB = 2**30
SHAPE: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def work_of(config: Any, **changes: Any) -> Work:
    options = {
        "name": "model",
        "quantization": "nf4",
        "compute_dtype": "bfloat16",
        "num_new_tokens": 44_223,
        "batch_size": 16,
        "seq_len": 128,
        "optimizer": "adafactor",
    }
    return read_work(config, **{**options, **changes})


@pytest.fixture(scope="module")
def qwen14b() -> Work:
    return work_of(Qwen2Config(**SHAPE))


# plan, peak in GB of 10^9 bytes: bench/RESULTS.md, H100, 2026-11-23
MEASURED = [
    (Plan(16, "kept", 1024), 30.87),
    (Plan(16, "kept", 1024, fused=True), 26.12),
    (Plan(16, "recomputed", 1024, fused=True), 15.62),
    (Plan(16, "offloaded", 1024, fused=True), 14.61),
    (Plan(16, "offloaded", 128, table_on_host=True, fused=True), 11.81),
    (Plan(16, "recomputed", 128, table_on_host=True, fused=True), 12.76),
    (Plan(8, "offloaded", 128, table_on_host=True, fused=True), 11.62),
]


@pytest.mark.parametrize(("plan", "peak_gb"), MEASURED)
def test_estimate_is_what_was_measured(plan: Plan, peak_gb: float, qwen14b: Work) -> None:
    assert estimate(plan, qwen14b).peak / 1e9 == pytest.approx(peak_gb, rel=0.07)


def test_sizes_are_those_of_the_model(qwen14b: Work) -> None:
    assert (qwen14b.num_layers, qwen14b.hidden_size, qwen14b.attention_size) == (48, 5120, 5120)
    assert (qwen14b.norms, qwen14b.tied, qwen14b.softcap, qwen14b.copies_qkv) == (2, False, False, False)
    assert qwen14b.matrix_bytes == 152_064 * 5120 * 2
    # 13.2e9 weights at half a byte, and an eighth of that for their scales' first level
    assert qwen14b.layer_params == 5120 * (5120 * 2 + 1024 * 2) + 3 * 5120 * 13_824
    assert qwen14b.body_bytes == pytest.approx(48 * qwen14b.layer_params * (0.5 + 1 / 64 + 1 / 4096), rel=0.001)


def test_parts_add_up(qwen14b: Work) -> None:
    for plan in (Plan(16, "kept", 512), Plan(4, "offloaded", 64, table_on_host=True, kept_layers=3, fused=True)):
        found = estimate(plan, qwen14b)
        fixed = sum(getattr(found, part) for part in ("body", "head", "table", "rows", "gradients", "optimizer"))
        assert fixed < found.peak <= fixed + found.activations + found.loss
        assert found.rows == 2 * 4 * 44_223 * 5120


def test_tied_model_has_one_matrix_and_one_set_of_rows() -> None:
    work = work_of(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}))
    found = estimate(Plan(16, "kept", 512), work)
    assert work.tied
    assert (found.table, found.rows) == (0, 4 * 44_223 * 5120)


def test_adamw_takes_two_values_more_a_row(qwen14b: Work) -> None:
    adamw = dataclasses.replace(qwen14b, optimizer="adamw")
    found = [estimate(Plan(16, "kept", 512), work).optimizer for work in (qwen14b, adamw)]
    assert found == [4 * (44_223 + 5120) * 2, 2 * 2 * 4 * 44_223 * 5120]


def test_more_memory_never_makes_a_slower_plan(qwen14b: Work) -> None:
    found = [choose_plan(qwen14b, int(gib * GIB), on_gpu=True, fused=True) for gib in (11.5, 12, 15, 24, 40, 80)]
    costs = [planner._cost(plan, qwen14b) for plan in found]
    assert all(a >= b for a, b in pairwise(costs))
    assert costs[0] > costs[-1]
    for plan, gib in zip(found, (11.5, 12, 15, 24, 40, 80), strict=True):
        assert estimate(plan, qwen14b).peak <= gib * GIB


def test_large_card_keeps_everything_and_a_small_one_moves_it_out(qwen14b: Work) -> None:
    large = choose_plan(qwen14b, 79 * GIB, on_gpu=True, fused=True)
    assert (large.micro_batch_size, large.activations, large.kept_layers) == (16, "kept", 48)
    small = choose_plan(qwen14b, 15 * GIB, on_gpu=True, fused=True)
    assert (small.micro_batch_size, small.activations != "kept", small.table_on_host) == (16, True, True)


def test_where_nothing_fits_the_leanest_is_tried(qwen14b: Work) -> None:
    assert make_plan(qwen14b, 5 * GIB, fused=True, host_is_apart=True) is None
    assert choose_plan(qwen14b, 5 * GIB, on_gpu=True, fused=True) == leanest(qwen14b, fused=True, host_is_apart=True)


def test_on_a_cpu_nothing_is_moved_to_the_host(qwen14b: Work) -> None:
    for gib in (5, 15, 20, 80):
        plan = choose_plan(qwen14b, gib * GIB, on_gpu=False, fused=False)
        assert (plan.table_on_host, plan.fused, plan.activations != "offloaded") == (False, False, True)


@pytest.mark.parametrize(
    ("device", "exact", "compiler", "fuses"),
    [
        ("cuda:0", False, "gcc", True),
        ("cuda:0", True, "gcc", False),
        ("cuda:0", False, None, False),
        ("cpu", False, "gcc", False),
    ],
)
def test_fused_kernels_need_a_gpu_a_compiler_and_no_exactness(
    device: str, exact: bool, compiler: str | None, fuses: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(resume.shutil, "which", lambda name: name if name == compiler else None)
    said: list[str] = []
    recipe = make_recipe(tmp_path, {"train": {"exact": exact}})
    assert resume._fuses(recipe, torch.device(device), said.append) == fuses
    assert bool(said) == (compiler is None)


def test_run_s_own_plan_is_kept_while_it_fits(qwen14b: Work) -> None:
    saved = Plan(8, "recomputed", 256, fused=True)
    assert choose_plan(qwen14b, 40 * GIB, on_gpu=True, fused=True, saved=saved) == saved
    assert choose_plan(qwen14b, 12 * GIB, on_gpu=True, fused=True, saved=saved) != saved
    assert choose_plan(qwen14b, 40 * GIB, on_gpu=True, fused=False, saved=saved) != saved
    assert choose_plan(qwen14b, 40 * GIB, on_gpu=False, fused=False, saved=saved) != saved


def test_stepping_down_ends(qwen14b: Work) -> None:
    plan = choose_plan(qwen14b, 79 * GIB, on_gpu=True, fused=True)
    plan = dataclasses.replace(plan, table_on_host=True)
    peaks = []
    while plan is not None:
        peaks.append(estimate(plan, qwen14b).peak)
        plan = leaner_plan(plan, qwen14b, host_is_apart=True)
    assert len(peaks) > 5
    assert all(b < 0.96 * a for a, b in pairwise(peaks[:-1]))
    assert peaks[-1] == estimate(leanest(qwen14b, fused=True, host_is_apart=True), qwen14b).peak


def test_flop_are_those_of_the_products(qwen14b: Work) -> None:
    tokens = 2048
    body = 48 * qwen14b.layer_params * tokens * 2 * 2
    head = tokens * 5120 * 2 * (2 * 152_064 + 3 * 44_223)
    assert qwen14b.flop == body + head


def test_model_of_another_build_is_refused_by_name() -> None:
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500)
    with pytest.raises(WakeError, match="base model model: GPT2LMHeadModel is not built like"):
        work_of(config)


def test_plan_of_another_version_is_none() -> None:
    assert planner.saved_plan({"micro_batch_size": 4, "checkpointing": True, "chunk_tokens": 3}) is None
    plan = Plan(4, "kept", 3)
    assert planner.saved_plan(plan.as_json()) == plan


def test_free_memory_of_the_host_is_positive() -> None:
    assert planner.free_memory(torch.device("cpu")) > GIB // 4


@pytest.mark.parametrize(("text", "size"), [("15GiB", 15 * GIB), ("16GB", 16 * 10**9), ("1000", 1000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0", "1e400GiB", "nanGiB"])
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(WakeError, match=r"--gpu-memory: .* is no size; write for example 15GiB"):
        parse_size(text, "--gpu-memory")
