"""`wake2vec export`: a run's rows in forms that other tools load without this package.

    rows     a PEFT adapter (TrainableTokens) with the tokenizer: small; goes onto the base resized to that tokenizer
    model    a whole folder in Hugging Face format, written shard by shard from the base's own files

Both are checked before they get their name: what was written is read back, and where the model is small its logits are
compared with the trainer's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wake2vec import __version__, base, card, hub, identity, sentry, shards, tokens
from wake2vec.errors import WakeError
from wake2vec.loss import logits
from wake2vec.rundir import RunDir, built, make_folder, write_file, write_json
from wake2vec.tables import StoredTable, bytes_of, decode_json, open_tables

FORMATS = ("rows", "model")
_MULTIPLE = 64
_SMALL_BYTES = 2 << 30
"""Base models up to this size are loaded and their logits compared."""
_CHECKED_TOKENS = 48
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What an export is made from.

    Attributes:
        rows: the trained rows in the newest whole sentry, "input" and, where the model is untied, "head".
        folder: the base model's files.
        names: the two tables' names in those files; the same table's where the model is tied.
    """

    run: RunDir
    record: dict[str, Any]
    step: int
    base: base.BaseId
    folder: Path
    words: tokens.WakeTokens
    rows: dict[str, StoredTable]
    names: dict[str, str]

    @property
    def tied(self) -> bool:
        """Return whether input and head are one table."""
        return "head" not in self.rows

    @property
    def vocab_size(self) -> int:
        """Return base tokens and new words together."""
        return self.words.first_new_id + len(self.words.words)


def export(run: RunDir, kind: str, out: Path | None, say: Say) -> Path:
    """Write an export into `out` (by default export/<kind> in the run's folder), replacing an earlier one.

    Raises:
        WakeError: something it needs is missing or it does not pass its check; nothing is left behind then.
    """
    source = read_source(run, say)
    target = out or run.export / kind
    if target.exists() and not (target / "README.md").exists() and any(target.iterdir()):
        raise WakeError(f"export {target}: holds other files; name another folder with --out")
    make_folder(target.parent)
    with built(target, replace=True) as folder:
        tokens.save(source.words.tokenizer, folder)
        digests = _write_rows(source, folder) if kind == "rows" else _write_model(source, folder, say)
        write_file(folder / "README.md", [card.text(kind, source.record, source.step, __version__).encode()])
        for file, expected in digests.items():
            shards.check(folder / file, expected)
        if sum(path.stat().st_size for path in source.folder.glob("*.safetensors")) <= _SMALL_BYTES:
            say(f"logits checked: {_check_logits(source, folder, kind)}")
        else:
            say("too large to compare logits here: every tensor was read back against its hash")
    return target


def read_source(run: RunDir, say: Say) -> Source:
    """Find the base model, the words and the newest whole sentry of a run.

    Raises:
        WakeError: one of them is missing or is not what the run was begun with.
    """
    record = identity.read_run(run)
    assert record is not None
    fixed = record["identity"]
    newest = next(sentry.whole(run, record["identity_sha256"]), None)
    if newest is None:
        raise WakeError(f"run {run.name}: no whole sentry in {run.sentries}; continue the run with `wake2vec train`")
    step, path = newest
    name = fixed["base"]["name"]
    found = base.identify(name, identity.locate(name, say), fixed["base"]["commit"])
    folder = Path(found.source) if found.revision is None else hub.download(found.name, found.commit, say)
    words = tokens.add_words(base.load_tokenizer(found), _words(run), fixed["recipe"]["tokens"]["match"])
    if words.first_new_id != fixed["base_vocab_size"] or len(words.words) != fixed["num_new_tokens"]:
        raise WakeError(
            f"run {run.name}: its new ids are {fixed['base_vocab_size']} and {fixed['num_new_tokens']} on, this base's "
            f"are {words.first_new_id} and {len(words.words)} on; put back the base model of the run"
        )
    return Source(run, record, step, found, folder, words, sentry.row_tables(path), _table_names(found))


def load_base(source: Source) -> base.FrozenBase:
    """Load the base model as the run has it, under its quantisation and type; in evaluation mode."""
    recipe = source.record["identity"]["recipe"]["model"]
    frozen = base.load(
        source.base,
        source.words.first_new_id,
        quantization=recipe["quantization"],
        compute_dtype=recipe["compute_dtype"],
        device=base.default_device(),
    )
    frozen.causal_lm.eval()
    return frozen


def _words(run: RunDir) -> list[str]:
    try:
        kept = sentry.read(run.reference / "base.safetensors")
    except sentry.DamagedError as error:
        raise WakeError(
            f"run {run.name}: reference/base.safetensors: {error}; continue the run with `wake2vec train`, which "
            "writes it at its start"
        ) from None
    words: list[str] = decode_json(kept.tensors["words"])
    return words


def _table_names(found: base.BaseId) -> dict[str, str]:
    """Return the names of the two tables' weights; no weights are loaded."""
    model = base.on_meta(base.load_config(found))
    modules = {id(module): name for name, module in model.named_modules()}
    return {
        "input": modules[id(model.get_input_embeddings())] + ".weight",
        "head": modules[id(model.get_output_embeddings())] + ".weight",
    }


def _write_rows(source: Source, folder: Path) -> dict[str, dict[str, str]]:
    first = source.words.first_new_id
    modules = [source.names[name].removesuffix(".weight").rsplit(".", 1)[-1] for name in source.rows]
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base.name,
        "revision": source.base.revision,
        "inference_mode": True,
        "init_weights": True,
        "target_modules": modules,
        "token_indices": list(range(first, source.vocab_size)),
    }
    write_file(folder / "adapter_config.json", [json.dumps(config, indent=1).encode() + b"\n"])
    # PEFT wants a tied head's rows too, and shares them again once they are loaded
    tensors = {
        f"base_model.model.{source.names[name].removesuffix('.weight')}.trainable_tokens_delta": shards.copied(
            source.rows["input" if source.tied else name]
        )
        for name in source.names
    }
    write_file(folder / "load.py", [card.load_script(source.base.name, source.base.revision).encode()])
    return {"adapter_model.safetensors": shards.write(folder / "adapter_model.safetensors", tensors)}


def _write_model(source: Source, folder: Path, say: Say) -> dict[str, dict[str, str]]:
    num_rows = -(-source.vocab_size // _MULTIPLE) * _MULTIPLE
    if not any((source.folder / name).exists() for name in (hub.WEIGHTS, hub.WEIGHTS_INDEX)):
        raise WakeError(
            f"base model {source.base.name}: has no {hub.WEIGHTS} and no {hub.WEIGHTS_INDEX}; it needs safetensors "
            "weights"
        )
    files = hub.weight_files(source.folder)
    digests: dict[str, dict[str, str]] = {}
    where: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        tensors = {}
        for name, table in open_tables(source.folder / file).items():
            kinds = [kind for kind, table_name in source.names.items() if table_name == name]
            if kinds:
                rows = source.rows["input" if source.tied else kinds[0]]
                tensors[name] = shards.extended(table, source.words.first_new_id, rows, num_rows)
            else:
                tensors[name] = shards.copied(table)
        digests[file] = shards.write(folder / file, tensors)
        _check_untouched(source.folder / file, digests[file], set(source.names.values()))
        where |= dict.fromkeys(tensors, file)
        say(f"wrote {file}, {number} of {len(files)}")
    missing = {source.names[kind] for kind in source.rows} - set(where)
    if missing:
        raise WakeError(f"base model {source.base.name}: {', '.join(missing)} is not in its files; use another model")
    if len(files) > 1:
        size = sum((folder / file).stat().st_size for file in files)
        write_json(folder / hub.WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    _write_configs(source, folder, num_rows)
    return digests


def _check_untouched(original: Path, written: dict[str, str], tables: set[str]) -> None:
    """Read the base's own file a second time: what an export leaves alone has the hash it has there."""
    for name, table in open_tables(original).items():
        if name not in tables and shards.digest_of(bytes_of(table)) != written[name]:
            raise WakeError(f"{original}: {name} changed while it was copied; put the file back and export again")


def _write_configs(source: Source, folder: Path, num_rows: int) -> None:
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    config["vocab_size"] = num_rows
    write_json(folder / "config.json", config)
    generation = source.folder / "generation_config.json"
    settings = json.loads(generation.read_text("utf-8")) if generation.exists() else {}
    if not settings:
        settings = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    if num_rows > source.vocab_size:
        settings["suppress_tokens"] = list(range(source.vocab_size, num_rows))
    write_json(folder / "generation_config.json", settings)


@torch.no_grad()
def _check_logits(source: Source, folder: Path, kind: str) -> str:
    """Compare the export's logits with the trainer's, under the run's own quantisation and type."""
    recipe = source.record["identity"]["recipe"]["model"]
    device = base.default_device()
    ids_BT = torch.linspace(0, source.vocab_size - 1, _CHECKED_TOKENS, device=device).long().unsqueeze(0)
    expected_TW = _trainer_logits(source, ids_BT, kind)
    if kind == "rows":
        found_TW = _adapter_logits(source, folder, ids_BT)
    else:
        causal_lm = base.load_folder(folder, folder.name, recipe["quantization"], recipe["compute_dtype"], device)
        found_TW = causal_lm.eval()(input_ids=ids_BT, use_cache=False).logits[0].float()
        if found_TW.shape[1] > source.vocab_size:
            over = found_TW[:, source.vocab_size :].amax(1) > found_TW[:, : source.vocab_size].amax(1)
            if bool(over.any()):
                raise WakeError(f"export {folder.name}: a padding row wins over all words; this is a bug, report it")
    difference = float((found_TW[:, : source.vocab_size] - expected_TW).abs().max() / expected_TW.abs().max())
    # the same sums in other kernels: rounding only, which is that of the type
    allowed = 1e-4 if recipe["compute_dtype"] == "float32" else 2e-2
    if not difference <= allowed:
        raise WakeError(
            f"export {folder.name}: its logits differ from the trainer's by {difference:.2g} of the largest, "
            f"{allowed:.2g} is rounding; do not use it, report it"
        )
    return f"largest difference {difference:.1e} of the largest logit"


def _trainer_logits(source: Source, ids_BT: Tensor, kind: str) -> Tensor:
    """Return the trainer's logits, its rows rounded to the type that the export keeps them in."""
    from wake2vec.overlay import WakeOverlay

    frozen = load_base(source)
    rows = {name: table[0 : table.shape[0]] for name, table in source.rows.items()}
    if kind == "model":
        stored = {name: _stored_dtype(source, name) for name in rows}
        rows = {name: rows_ND.to(stored[name]).float() for name, rows_ND in rows.items()}
    rows = {name: rows_ND.to(ids_BT.device) for name, rows_ND in rows.items()}
    overlay = WakeOverlay(frozen.table_VD, torch.nn.Parameter(rows["input"]), source.words.first_new_id)
    hidden_MD = frozen.hidden(overlay(ids_BT)).flatten(0, 1)
    head_rows_ND = rows["input" if source.tied else "head"]
    return logits(hidden_MD, frozen.head_VD, head_rows_ND, softcap=frozen.softcap).float()


def _stored_dtype(source: Source, name: str) -> torch.dtype:
    for file in hub.weight_files(source.folder):
        tables = open_tables(source.folder / file)
        if source.names[name] in tables:
            return tables[source.names[name]][0:0].dtype
    raise AssertionError(name)


def _adapter_logits(source: Source, folder: Path, ids_BT: Tensor) -> Tensor:
    from peft import PeftModel

    frozen = load_base(source)
    frozen.causal_lm.resize_token_embeddings(source.vocab_size, mean_resizing=False)
    model = PeftModel.from_pretrained(frozen.causal_lm, str(folder)).eval()
    found_TW: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    return found_TW


def push(folder: Path, name: str, *, public: bool, say: Say) -> str:
    """Upload an export to the hub, private unless told otherwise; return its address.

    Raises:
        WakeError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    say(f"uploading {folder} to {name}")
    try:
        api = HfApi()
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"wake2vec {__version__} export")
    except HFValidationError:
        raise WakeError(f"push {name}: no name of a repository; write --push ORG/NAME") from None
    except (HfHubHTTPError, OSError, hub.client_error()) as error:
        raise WakeError(f"push {name}: the hub refused ({error}); check HF_TOKEN and its rights") from None
    return str(address)
