"""How a step is cut up and where things lie: it decides speed and memory, never what is computed.

The planner (`planner.py`) chooses. The estimate follows the tensors that are alive at three moments: the loss (all that
the backward pass will need, and the logits of a chunk), the backward pass of a layer, and the optimizer.

All sizes are bytes of what torch allocates; the CUDA context (about 0.5 GB) is outside.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from wake2vec.base import EAGER_ATTENTION, on_meta
from wake2vec.errors import WakeError
from wake2vec.loss import CAST_ROWS

Activations = Literal["kept", "recomputed", "offloaded"]
ACTIVATIONS: tuple[Activations, ...] = ("kept", "recomputed", "offloaded")
_SLICE_ROWS = 4096


@dataclass(frozen=True)
class Plan:
    """What the loop follows; it is kept in every sentry, so that a resume repeats it.

    Attributes:
        micro_batch_size: blocks computed at a time; it divides the batch.
        activations: what the backward pass needs is kept, or computed again a layer at a time from the layers' inputs,
            which lie on the device or offloaded to host memory.
        table_on_host: whether the base input table lies in host memory (untied models only).
        kept_layers: decoder layers whose weights lie unpacked to 16 bits beside the packed ones.
        shared_buffer: whether the others are unpacked a layer at a time into memory that they share, or a matrix at a
            time.
        chunk_tokens: tokens whose logits are held at a time.
        fused: whether fused kernels take the place of transformers' own.
    """

    micro_batch_size: int
    activations: Activations
    chunk_tokens: int
    table_on_host: bool = False
    kept_layers: int = 0
    shared_buffer: bool = False
    fused: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return what a sentry keeps."""
        return asdict(self)

    def __str__(self) -> str:
        table = ", base table on the host" if self.table_on_host else ""
        kept = f", weights of {self.kept_layers} layers unpacked" if self.kept_layers else ""
        return f"micro-batch {self.micro_batch_size}, activations {self.activations}{kept}{table}"


@dataclass(frozen=True)
class Work:
    """What a plan is made for: a model's sizes and a run's.

    Attributes:
        element_bytes: of the compute type.
        body_bytes: the decoder as it lies in memory; `layer_params`: weights of one layer's matrices,
            `largest_params` of its largest one.
        matrix_bytes: one table or head with its padding rows.
        attention_size: heads times their size. `intermediate_size`: of the MLP.
        norms: a layer's norms. `copies_qkv`: whether queries, keys and values come out of one matrix.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_size: int
    num_heads: int
    norms: int
    copies_qkv: bool
    eager_attention: bool
    softcap: bool
    tied: bool
    packed: bool
    element_bytes: int
    body_bytes: int
    layer_params: int
    largest_params: int
    matrix_bytes: int
    vocab_size: int
    num_new_tokens: int
    batch_size: int
    seq_len: int
    optimizer: str

    @property
    def num_matrices(self) -> int:
        """Return how many sets of rows are trained."""
        return 1 if self.tied else 2

    @property
    def body_flop(self) -> int:
        """Return the floating-point operations of a step's forward matrix products in the body."""
        return 2 * self.batch_size * self.seq_len * self.layer_params * self.num_layers

    @property
    def flop(self) -> int:
        """Return the floating-point operations of a step's matrix products, without any done twice."""
        tokens = self.batch_size * self.seq_len
        rows = self.vocab_size * 2 + self.num_new_tokens * 3
        return 2 * self.body_flop + 2 * tokens * rows * self.hidden_size


def read_work(
    config: Any,
    *,
    name: str,
    quantization: str,
    compute_dtype: str,
    num_new_tokens: int,
    batch_size: int,
    seq_len: int,
    optimizer: str,
) -> Work:
    """Take a model's sizes from its transformers configuration; no weight is loaded.

    Raises:
        WakeError: its decoder is built otherwise than those that can be planned for.
    """
    model = on_meta(config)
    element_bytes = getattr(torch, compute_dtype).itemsize
    packed = quantization == "nf4"
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    try:
        layers = model.base_model.layers
        attention = layers[0].self_attn
        attention_size, intermediate_size = attention.o_proj.weight.shape[1], config.intermediate_size
    except AttributeError as error:
        raise WakeError(
            f"base model {name}: {type(model).__name__} is not built like the models that are planned for ({error}); "
            "use a Llama, Mistral, Qwen2, Phi-3 or Gemma 2 model"
        ) from None
    linears = [module.weight.numel() for module in layers[0].modules() if isinstance(module, torch.nn.Linear)]
    linear_params = sum(linears) * len(layers)
    linear_bytes = sum(map(_packed_bytes, linears)) * len(layers) if packed else linear_params * element_bytes
    other_params = sum(p.numel() for p in model.base_model.parameters()) - table.numel() - linear_params
    return Work(
        num_layers=len(layers),
        hidden_size=table.shape[1],
        intermediate_size=intermediate_size,
        attention_size=attention_size,
        num_heads=config.num_attention_heads,
        norms=sum("norm" in part for part, _ in layers[0].named_children()),
        copies_qkv=hasattr(attention, "qkv_proj"),
        eager_attention=config.model_type in EAGER_ATTENTION,
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        tied=head is table or bool(config.tie_word_embeddings),  # transformers 5 ties nothing without weights
        packed=packed,
        element_bytes=element_bytes,
        body_bytes=linear_bytes + other_params * element_bytes,
        layer_params=sum(linears),
        largest_params=max(linears),
        matrix_bytes=table.numel() * element_bytes,
        vocab_size=table.shape[0],
        num_new_tokens=num_new_tokens,
        batch_size=batch_size,
        seq_len=seq_len,
        optimizer=optimizer,
    )


def _packed_bytes(params: int) -> int:
    """Return the bytes of a matrix in NF4 with double quantisation: blocks of 64, their scales in blocks of 256."""
    scales = math.ceil(params / 64)
    return math.ceil(params / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part; `activations` and `loss` are not at their largest at the same time, `peak` knows when."""

    body: int
    head: int
    table: int
    rows: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    peak: int
    host: int


def estimate(plan: Plan, work: Work) -> Estimate:
    """Return what a plan takes of the device's memory, and of the host's where something was moved there."""
    tokens = plan.micro_batch_size * work.seq_len
    row_bytes = 4 * work.num_new_tokens * work.hidden_size
    unpacked_layers = (plan.kept_layers + plan.shared_buffer) * work.packed
    body = work.body_bytes + unpacked_layers * work.layer_params * work.element_bytes
    table_bytes = 0 if work.tied else work.matrix_bytes
    sparse = 0 if work.tied else 4 * work.batch_size * work.seq_len * work.hidden_size
    gradients = row_bytes + sparse
    state = 4 * (work.num_new_tokens + work.hidden_size) * work.num_matrices
    optimizer = state if work.optimizer == "adafactor" else 2 * row_bytes * work.num_matrices
    fixed = body + work.matrix_bytes + (0 if plan.table_on_host else table_bytes)
    fixed += row_bytes * work.num_matrices + gradients + optimizer
    inputs = work.num_layers * tokens * work.hidden_size * work.element_bytes
    layer, transient = _layer_bytes(plan, work, tokens), _transient_bytes(plan, work, tokens)
    held = {"kept": work.num_layers * layer, "recomputed": inputs, "offloaded": inputs * 3 // work.num_layers}
    stored = held[plan.activations]
    backward = stored + transient + (0 if plan.activations == "kept" else layer)
    loss = _loss_bytes(plan, work, tokens)
    updating = 4 * work.hidden_size * (4 * _slice_rows(work) + 2 * work.batch_size * work.seq_len)
    return Estimate(
        body=body,
        head=work.matrix_bytes,
        table=0 if plan.table_on_host else table_bytes,
        rows=row_bytes * work.num_matrices,
        gradients=gradients,
        optimizer=optimizer,
        activations=backward,
        loss=loss,
        peak=fixed + max(backward, stored + loss, updating),
        host=(table_bytes if plan.table_on_host else 0) + (inputs if plan.activations == "offloaded" else 0),
    )


def _slice_rows(work: Work) -> int:
    return min(_SLICE_ROWS, work.num_new_tokens)


def _layer_bytes(plan: Plan, work: Work, tokens: int) -> int:
    """Return what the backward pass of one layer needs: norms' and MLP's inputs, queries to attention's output."""
    half = work.element_bytes == 2
    norms = work.norms * work.hidden_size * (1 if plan.fused or not half else 2)  # 32-bit copies otherwise
    mlp = work.intermediate_size * (2 if plan.fused else 3)
    attention = work.attention_size * (6 if work.copies_qkv else 4)
    scores = work.num_heads * (9 * work.seq_len if work.eager_attention else 4)
    return tokens * ((norms + mlp + attention) * work.element_bytes + scores)


def _transient_bytes(plan: Plan, work: Work, tokens: int) -> int:
    """Return what comes and goes within a layer: an unpacked matrix, gradients of the MLP and the hidden states."""
    by_matrix = work.packed and not plan.shared_buffer and plan.kept_layers < work.num_layers
    unpacked = work.largest_params * work.element_bytes * by_matrix
    wide = 3 * 4 * work.hidden_size if work.element_bytes == 2 and not plan.fused else 0
    return unpacked + tokens * ((work.intermediate_size + 4 * work.hidden_size) * work.element_bytes + wide)


def _loss_bytes(plan: Plan, work: Work, tokens: int) -> int:
    """Return what `loss.split_cross_entropy` takes, and the hidden states with their gradient."""
    half = work.element_bytes == 2
    words = work.vocab_size + work.num_new_tokens
    chunk = min(plan.chunk_tokens, tokens)
    scores = chunk * words * (6 if half else 8 if work.softcap else work.element_bytes)
    cast = min(CAST_ROWS, work.num_new_tokens) * work.element_bytes
    rows = (cast + 4 * _slice_rows(work)) * work.hidden_size if half else 0
    hidden = 2 * tokens * work.hidden_size * work.element_bytes + 2 * chunk * work.hidden_size * 4
    return scores + rows + hidden
