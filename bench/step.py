"""Time training steps of full-size Qwen2.5-14B with random weights on a CUDA card, no download.

    python bench/step.py [--steps 20]

The base is built straight into NF4, a layer at a time; text and words are random ids: 16 x 128 tokens a step, 44,223
new words, Adafactor. Prints one JSON object a plan: seconds a step (median, smallest, largest), peak memory, losses.
"""

import argparse
import json
import statistics
import time

import bitsandbytes
import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from wake2vec import base
from wake2vec.model import WakeModel
from wake2vec.optimizer import clip_scale, grad_norm, make_optimizer

BASE_VOCAB_SIZE, NUM_NEW_TOKENS, SEQ_LEN, BATCH_SIZE = 151_665, 44_223, 128, 16
CHUNK_TOKENS = 342
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


def build_base() -> base.FrozenBase:
    """Return the model with random weights; a linear layer's 16-bit weight is dropped once it is quantised."""
    config = Qwen2Config(**QWEN_14B)
    config._attn_implementation = "sdpa"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
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
    model.model.rotary_emb = Qwen2RotaryEmbedding(config, device="cuda")
    return base.freeze(model, BASE_VOCAB_SIZE, "Qwen2.5-14B, random")


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def time_steps(
    frozen: base.FrozenBase, micro_batch_size: int, checkpointing: bool, num_steps: int
) -> dict[str, object]:
    """Train on one random batch; the first steps warm up and are not counted."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(NUM_NEW_TOKENS, 5120, generator=generator) * 0.02 for name in ("input", "head")}
    blocks = torch.randint(BASE_VOCAB_SIZE + NUM_NEW_TOKENS, (BATCH_SIZE, SEQ_LEN + 1), generator=generator).cuda()
    if not checkpointing:
        frozen.causal_lm.gradient_checkpointing_disable()
    model = WakeModel(frozen, rows, chunk_tokens=CHUNK_TOKENS, checkpointing=checkpointing)
    optimizer = make_optimizer("adafactor", model.rows)
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.zero_grad()
        loss = torch.stack([model.backward(micro) for micro in blocks.split(micro_batch_size)]).sum()
        num_scored = BATCH_SIZE * SEQ_LEN
        norm = grad_norm(model.rows.values()) / num_scored
        optimizer.step(5e-4, clip_scale(norm, 1.0) / num_scored)
        losses.append(float(loss) / num_scored)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    counted = seconds[3:]
    return {
        "micro_batch": f"{micro_batch_size} x {BATCH_SIZE // micro_batch_size}",
        "checkpointing": checkpointing,
        "step_s": [round(value, 3) for value in (statistics.median(counted), min(counted), max(counted))],
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss_nats": [round(losses[0], 3), round(losses[-1], 3)],
    }


def main() -> None:
    """Run every plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    num_steps = parser.parse_args().steps
    versions = {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}
    print(json.dumps({"card": torch.cuda.get_device_name(), **versions}), flush=True)
    frozen = build_base()
    print(json.dumps({"loaded_gb": round(torch.cuda.memory_allocated() / 1e9, 2)}), flush=True)
    for micro_batch_size, checkpointing, steps in ((16, False, num_steps), (16, True, num_steps), (1, True, 2)):
        print(json.dumps(time_steps(frozen, micro_batch_size, checkpointing, steps)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
