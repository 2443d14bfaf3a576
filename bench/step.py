"""Time training steps at full size with random weights on a CUDA card, side by side, no download.

    python bench/step.py [--steps 20] [--only floor earlier peft ours recipes]
    python bench/step.py --draw FILE      a plot (.png beside it) of lines that were printed

Each base is built straight into NF4, a layer at a time; text and words are random ids; a step is the recipe's batch.
Prints one JSON object a measurement. `floor` is the matrix products alone; `earlier` the earlier scripts' loop; `peft`
PEFT's TrainableTokens on input and head; `ours` the trainer under plans made for cards of several sizes, each kept to
that size; `recipes` ten steps of every other recipe.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from wake2vec import base
from wake2vec.config import load_recipe
from wake2vec.model import WakeModel
from wake2vec.optimizer import clip_scale, grad_norm, make_optimizer
from wake2vec.plan import Plan, Work, estimate, read_work
from wake2vec.planner import USABLE, choose_plan

WARM_UP = 3
GROUP = 4
GIB = 2**30
LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
QWEN_14B = {
    "vocab_size": 152_064,
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


def _llama_3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(**_sizes(hidden, intermediate, layers, heads, tie_word_embeddings=tied, **LLAMA_3))


# config, tokenizer length, new words; the shapes are those of the published config.json files
MODELS: dict[str, tuple[Callable[[], PretrainedConfig], int, int]] = {
    "qwen14b": (lambda: Qwen2Config(**QWEN_14B), 151_665, 44_223),
    "llama1b": (lambda: _llama_3(2048, 8192, 16, 32, tied=True), 128_256, 44_195),
    "llama3b": (lambda: _llama_3(3072, 8192, 28, 24, tied=True), 128_256, 44_195),
    "llama8b": (lambda: _llama_3(4096, 14_336, 32, 32, tied=False), 128_256, 44_195),
    "mistral7b": (
        lambda: MistralConfig(
            **_sizes(4096, 14_336, 32, 32, num_key_value_heads=8, vocab_size=32_768, sliding_window=None)
        ),
        32_768,
        44_553,
    ),
    "tinyllama": (
        lambda: LlamaConfig(**_sizes(2048, 5632, 22, 32, num_key_value_heads=4, vocab_size=32_000)),
        32_000,
        44_500,
    ),
    "phi35": (
        lambda: Phi3Config(
            **_sizes(3072, 8192, 32, 32, num_key_value_heads=32, vocab_size=32_064, sliding_window=None, pad_token_id=0)
        ),
        32_011,
        44_500,
    ),
    "gemma9b": (
        lambda: Gemma2Config(
            **_sizes(3584, 14_336, 42, 16, num_key_value_heads=8, head_dim=256, vocab_size=256_000),
            query_pre_attn_scalar=256,
        ),
        256_000,
        44_000,
    ),
}


def say(**values: Any) -> None:
    """Print a measurement."""
    print(json.dumps(values), flush=True)


def build(config: PretrainedConfig) -> Any:
    """Return the model with random weights; a linear layer's 16-bit weight is dropped once it is quantised."""
    config._attn_implementation = "eager" if config.model_type in base.EAGER_ATTENTION else "sdpa"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = _random(module.out_features, module.in_features)
            module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cuda")
            module.compute_dtype = torch.bfloat16
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.ones_like(parameter, device="cuda") if leaf == "weight" and parameter.dim() == 1 else None
            value = _random(*parameter.shape) if value is None else value
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # Gemma's embedding scale
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.tensor(config.hidden_size**0.5, device="cuda"))
    return model


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def timed(step: Callable[[], Tensor], num_steps: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Run steps, a few at a time without waiting in between, as training does.

    Returns:
        Seconds a step (median, smallest and largest of the groups), peak memory, the first and the last loss.
    """
    torch.cuda.reset_peak_memory_stats()
    losses = [float(step()) for _ in range(warm_up)]
    seconds = []
    for start in range(0, num_steps, GROUP):
        count = min(GROUP, num_steps - start)
        torch.cuda.synchronize()
        started = time.perf_counter()
        group = [step() for _ in range(count)]
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / count)
        losses += [float(loss) for loss in group]
    return {
        "step_s": [round(value, 4) for value in (statistics.median(seconds), min(seconds), max(seconds))],
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss_nats": [round(losses[0], 4), round(losses[-1], 4)],
        "falls": losses[-1] < losses[0],
    }


def free() -> None:
    """Give back what nothing holds."""
    gc.collect()
    torch.cuda.empty_cache()


def random_blocks(vocab_size: int, batch_size: int, seq_len: int) -> Tensor:
    """Return one batch, on the host."""
    return torch.randint(vocab_size, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))


def random_rows(names: tuple[str, ...], count: int, hidden_size: int) -> dict[str, Tensor]:
    """Return start rows."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, hidden_size, generator=generator) * 0.02 for name in names}


def floor(num_steps: int) -> None:
    """Time the matrix products of a qwen14b step alone: forward and the hidden states' backward, head and rows."""
    tokens, words, new = 2048, 151_665 + 44_223, 44_216
    shapes = [(5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120), (13_824, 5120), (13_824, 5120), (5120, 13_824)]
    layers = [[_random(*shape) for shape in shapes] for _ in range(8)]  # more than the caches hold
    head, inputs = _random(words, 5120), {size: _random(tokens, size) for size in (5120, 1024, 13_824)}

    def step() -> Tensor:
        for index in range(48):
            for weight in layers[index % 8]:
                inputs[weight.shape[1]] @ weight.T
        for hidden in inputs[5120].split(512):
            scores = hidden @ head.T
            scores @ head
            scores[:, -new:].T @ hidden
        for index in range(48):
            for weight in layers[index % 8]:
                inputs[weight.shape[0]] @ weight
        return torch.zeros(())

    say(what="floor", **{key: value for key, value in timed(step, num_steps).items() if key in ("step_s",)})


def earlier(model: Any, num_steps: int) -> None:
    """The earlier scripts' loop: 1 x 16, checkpointing, input rows over the table, the head re-tied, all logits."""
    config, vocab_size, new = model.config, 151_665, 44_223
    rows_ND = nn.Parameter(random_rows(("input",), new, config.hidden_size)["input"].cuda())
    table_VD = model.get_input_embeddings().weight.detach()[:vocab_size]
    optimizer = transformers.Adafactor(
        [rows_ND], lr=5e-4, scale_parameter=False, relative_step=False, warmup_init=False
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    blocks = random_blocks(vocab_size + new, 16, 128).cuda()

    def step() -> Tensor:
        total = torch.zeros((), device="cuda")
        for block_BT in blocks.split(1):
            ids_BT = block_BT[:, :-1]
            new_BT = ids_BT >= vocab_size
            old_BTD = functional.embedding(ids_BT.clamp(max=vocab_size - 1), table_VD)
            new_BTD = functional.embedding((ids_BT - vocab_size).clamp(min=0), rows_ND).to(old_BTD.dtype)
            embeds_BTD = torch.where(new_BT.unsqueeze(-1), new_BTD, old_BTD)
            hidden_BTD = model.model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
            logits_BTV = hidden_BTD @ torch.cat([table_VD, rows_ND.detach().to(table_VD.dtype)]).T
            loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), block_BT[:, 1:].flatten()) / 16
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_([rows_ND], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    say(what="earlier", micro_batch="1 x 16", **timed(step, num_steps, warm_up=1))
    model.gradient_checkpointing_disable()


def peft_trainable_tokens(num_steps: int) -> None:
    """PEFT's TrainableTokens on input and head, of a model that has the new rows in its own tables."""
    from peft import TrainableTokensConfig, get_peft_model

    vocab_size, new = 151_665, 44_223
    model = build(Qwen2Config(**{**QWEN_14B, "vocab_size": vocab_size + new}))
    adapter = TrainableTokensConfig(
        token_indices=list(range(vocab_size, vocab_size + new)), target_modules=["embed_tokens", "lm_head"]
    )
    model = get_peft_model(model, adapter)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = transformers.Adafactor(trained, lr=5e-4, scale_parameter=False, relative_step=False, warmup_init=False)
    blocks = random_blocks(vocab_size + new, 16, 128).cuda()

    def step(size: int) -> Tensor:
        total = torch.zeros((), device="cuda")
        for block_BT in blocks.split(size):
            with torch.autocast("cuda", torch.bfloat16):
                logits_BTV = model(input_ids=block_BT[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), block_BT[:, 1:].flatten())
            loss = loss * size / 16
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    for size, checkpointing, steps in ((16, True, num_steps), (16, False, num_steps), (4, False, 4), (1, True, 2)):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        free()
        try:
            found = timed(lambda: step(size), steps, warm_up=2 if size > 1 else 1)  # noqa: B023 - called at once
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        say(what="peft", micro_batch=f"{size} x {16 // size}", checkpointing=checkpointing, **found)


def work_of(name: str, config: PretrainedConfig, vocab_size: int, new: int, changes: list[str]) -> tuple[Work, Any]:
    """Return what a recipe's plan is made for, and the recipe."""
    _, recipe = load_recipe(name, changes)
    work = read_work(
        config,
        name=name,
        quantization="nf4",
        compute_dtype="bfloat16",
        num_new_tokens=new,
        batch_size=recipe.train.batch_size,
        seq_len=recipe.data.seq_len,
        optimizer=recipe.train.optimizer,
    )
    assert work.vocab_size >= vocab_size
    return work, recipe


def ours(frozen: base.FrozenBase, work: Work, recipe: Any, plan: Plan, num_steps: int, **said: Any) -> None:
    """Train on one random batch under a plan, and compare the peak with the estimate."""
    names = ("input",) if work.tied else ("input", "head")
    vocab_size = len(frozen.table_VD)
    model = WakeModel(frozen, random_rows(names, work.num_new_tokens, work.hidden_size), plan)
    optimizer = make_optimizer(recipe.train.optimizer, model.rows)
    blocks = random_blocks(vocab_size + work.num_new_tokens, work.batch_size, work.seq_len).to(model.ids_device)
    num_scored = work.batch_size * work.seq_len

    def step() -> Tensor:
        model.zero_grad()
        losses = [model.backward(micro) for micro in blocks.split(plan.micro_batch_size)]
        norm = grad_norm(model.rows.values()) / num_scored
        optimizer.step(recipe.train.learning_rate, clip_scale(norm, recipe.train.max_grad_norm) / num_scored)
        return torch.stack(losses).sum() / num_scored

    free()
    try:
        found = timed(step, num_steps)
        found["estimate_gb"] = round(estimate(plan, work).peak / 1e9, 2)
        found["estimate_off"] = round(estimate(plan, work).peak / 1e9 / found["peak_gb"] - 1, 3)
        if said.pop("profile", False):
            found["idle"] = idle_share(step)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    say(**said, plan=plan.as_json(), **found)


def idle_share(step: Callable[[], Tensor], num_steps: int = 10) -> float:
    """Return the share of ten steps' time in which no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return round(1.0 - busy / (end - spans[0][0]), 4)


def qwen_plans(num_steps: int, names: tuple[str, ...], *, with_earlier: bool, with_ours: bool) -> None:
    """Measure qwen14b: the earlier loop, then plans for several cards, each in the memory of that card."""
    make_config, vocab_size, new = MODELS["qwen14b"]
    model = build(make_config())
    say(what="loaded", gb=round(torch.cuda.memory_allocated() / 1e9, 2))
    if with_earlier:
        earlier(model, 3)
        free()
    if not with_ours:
        return
    total = torch.cuda.mem_get_info()[1]
    frozen = base.freeze(model, vocab_size, "qwen14b")
    total = torch.cuda.mem_get_info()[1]
    work, recipe = work_of("qwen14b", make_config(), vocab_size, new, [])
    long, _ = work_of("qwen14b", make_config(), vocab_size, new, ["data.seq_len=512"])
    cards = [
        ("80 GB", work, 79 * GIB),
        ("48 GB", work, 47 * GIB),
        ("40 GB", work, 39 * GIB),
        ("24 GB", work, int(22.5 * GIB)),
        ("15 GiB", work, 15 * GIB),
        ("12.5 GB at most", work, int(12.45e9 / USABLE)),
        ("15 GiB, 512 tokens a block", long, 15 * GIB),
    ]
    for card, of, limit in cards:
        if not card.startswith(names):
            continue
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        plan = choose_plan(of, min(limit, total), on_gpu=True, fused=True)
        if plan.table_on_host and frozen.table_VD.is_cuda:
            frozen = base.with_table_on_host(frozen)
        plan = replace(plan, table_on_host=not frozen.table_VD.is_cuda)
        steps = num_steps if of is work else 5
        ours(frozen, of, recipe, plan, steps, what="ours", card=card, profile=of is work)
    torch.cuda.set_per_process_memory_fraction(1.0)


def other_recipes(num_steps: int) -> None:
    """Measure every other recipe under the plan for the whole card and the leanest that is made for 15 GiB."""
    total = torch.cuda.mem_get_info()[1]
    for name, (make_config, vocab_size, new) in MODELS.items():
        if name == "qwen14b":
            continue
        work, recipe = work_of(name, make_config(), vocab_size, new, [])
        frozen = base.freeze(build(make_config()), vocab_size, name)
        for card, limit in (("80 GB", int(0.97 * total)), ("15 GiB", 15 * GIB)):
            plan = choose_plan(work, limit, on_gpu=True, fused=True)
            if plan.table_on_host:
                frozen = base.with_table_on_host(frozen)
            ours(frozen, work, recipe, plan, num_steps, what=name, card=card)
        del frozen
        free()


def draw(path: Path) -> None:
    """Plot seconds a step over peak memory, each loop and plan a point, from a file of printed lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for said in found:
        kind, step_s = said.get("what"), said.get("step_s")
        if kind == "floor":
            axis.axhline(step_s[0], color="gray", linestyle="--", linewidth=1)
            axis.annotate("matrix products alone", (45, step_s[0]), (0, -10), textcoords="offset points", fontsize=8)
        if step_s is None or kind not in ("earlier", "peft", "ours") or "512" in said.get("card", ""):
            continue
        color = {"earlier": "tab:red", "peft": "tab:orange", "ours": "tab:blue"}[kind]
        name = said.get("card") or f"{said['micro_batch']}{', checkpointing' if said.get('checkpointing') else ''}"
        axis.plot(said["peak_gb"], step_s[0], "o", color=color)
        label = f"{'earlier script' if kind == 'earlier' else kind}: {name}"
        where, slant = (said["peak_gb"], step_s[0]), 20 if kind == "ours" else 0
        axis.annotate(label, where, (3, 5), textcoords="offset points", fontsize=8, color=color, rotation=slant)
    axis.set(yscale="log", xlabel="peak GPU memory (GB)", ylabel="seconds a step", xlim=(8, 66), ylim=(0.15, 14))
    axis.set_title(f"Qwen2.5-14B, 16 x 128 tokens a step, {found[0]['card']}", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    """Run what is asked for."""
    parts = ["floor", "earlier", "peft", "ours", "recipes"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cards", nargs="+", help="only plans for cards whose name begins so")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--draw", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw)
        return
    versions = {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}
    say(card=torch.cuda.get_device_name(), **versions)
    if "floor" in options.only:
        floor(options.steps)
        free()
    if "earlier" in options.only or "ours" in options.only:
        qwen_plans(
            options.steps,
            tuple(options.cards or [""]),
            with_earlier="earlier" in options.only,
            with_ours="ours" in options.only,
        )
        free()
    if "peft" in options.only:
        peft_trainable_tokens(options.steps)
        free()
    if "recipes" in options.only:
        other_recipes(10)


if __name__ == "__main__":
    main()
