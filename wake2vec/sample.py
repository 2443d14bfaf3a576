"""`wake2vec sample`: text out of a trained run, seeded, with the new words told apart.

Shapes: B texts of a batch, T tokens so far, V all words, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wake2vec import tokens
from wake2vec.errors import WakeError
from wake2vec.export import load_base, read_source
from wake2vec.loss import logits
from wake2vec.overlay import WakeOverlay
from wake2vec.rundir import RunDir

PROMPT = "riverrun, past Eve and Adam's,"
_NGRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """How a text is drawn."""

    temperature: float
    max_new_tokens: int = 256
    num_texts: int = 1
    top_p: float = 0.92
    top_k: int = 50
    repetition_penalty: float = 1.15


BATTERY = {
    "one": (Settings(0.9),),
    "sweep": tuple(Settings(temperature) for temperature in (0.5, 0.7, 0.9, 1.0, 1.2)),
    "three": (Settings(0.9, num_texts=3),),
    "long": (Settings(1.1, num_texts=3, max_new_tokens=512),),
}
"""What the earlier runs drew from PROMPT."""


@dataclass(frozen=True)
class Sample:
    """A text: its pieces with whether each is a new word, and its numbers."""

    part: str
    prompt: str
    settings: Settings
    seed: int
    pieces: list[tuple[str, bool]]
    numbers: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return {**asdict(self), "text": "".join(piece for piece, _ in self.pieces)}


class Sampler:
    """A run's newest rows on its base model, ready to write."""

    def __init__(self, run: RunDir, say: Callable[[str], None]) -> None:
        source = read_source(run, say)
        self._base = load_base(source)
        rows = {name: table[0 : table.shape[0]].to(self._base.device) for name, table in source.rows.items()}
        self._head_rows = rows["input" if source.tied else "head"]
        self._overlay = WakeOverlay(self._base.table_VD, torch.nn.Parameter(rows["input"]), source.words.first_new_id)
        self._tokenizer = source.words.tokenizer
        self.first_new_id = source.words.first_new_id
        self._stop = _end_ids(self._base.causal_lm.generation_config.eos_token_id)
        self.step = source.step
        self.title = f"{source.record['run']}, step {source.step}, {source.base.name}"

    @torch.no_grad()
    def draw(self, prompt: str, settings: Settings, seed: int, part: str = "prompt") -> list[Sample]:
        """Return the texts of one setting, drawn together; each is ended by the model's own end token.

        Raises:
            WakeError: the prompt has no tokens.
        """
        ids, _ = tokens.encode(self._tokenizer, prompt)
        bos = tokens.bos_id(self._tokenizer)
        ids = ids if bos is None else [bos, *ids]
        if not ids:
            raise WakeError("sample: the prompt is empty; write --prompt with some text")
        drawn_BT = self._generate(torch.tensor([ids] * settings.num_texts, device=self._base.device), settings, seed)
        samples = []
        for drawn in drawn_BT.tolist():
            ends = [i for i, id_ in enumerate(drawn) if id_ in self._stop]
            text_ids = drawn[: ends[0]] if ends else drawn
            pieces = list(self._pieces(ids, text_ids))
            samples.append(Sample(part, prompt, settings, seed, pieces, self._numbers(text_ids)))
        return samples

    def _generate(self, ids_BT: Tensor, settings: Settings, seed: int) -> Tensor:
        """Draw up to max_new_tokens after the prompt, all texts of the batch at once, with a KV cache."""
        from transformers import DynamicCache

        generator = torch.Generator(device=ids_BT.device).manual_seed(seed)
        cache = DynamicCache(config=self._base.causal_lm.config)
        warp = _warpers(settings)
        given, step_BT = ids_BT.shape[1], ids_BT
        ended_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        for _ in range(settings.max_new_tokens):
            out = self._base.body(inputs_embeds=self._overlay(step_BT), past_key_values=cache, use_cache=True)
            last_BD = out.last_hidden_state[:, -1]
            scores_BV = logits(last_BD, self._base.head_VD, self._head_rows, softcap=self._base.softcap).float()
            for warper in warp:
                scores_BV = warper(ids_BT, scores_BV)
            step_BT = torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)
            ids_BT = torch.cat([ids_BT, step_BT], 1)
            ended_B |= torch.isin(step_BT[:, 0], torch.tensor(sorted(self._stop), device=ids_BT.device))
            if bool(ended_B.all()):
                break
        return ids_BT[:, given:]

    def _pieces(self, prompt_ids: list[int], ids: list[int]) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces of old tokens and of new words; together they are the decoded text."""
        whole, shown = list(prompt_ids), tokens.decode(self._tokenizer, prompt_ids)
        start = 0
        while start < len(ids):
            new = ids[start] >= self.first_new_id
            end = start + 1
            while not new and end < len(ids) and ids[end] < self.first_new_id:
                end += 1
            whole += ids[start:end]
            text = tokens.decode(self._tokenizer, whole)
            yield text[len(shown) :], new
            shown, start = text, end

    def _numbers(self, ids: Sequence[int]) -> dict[str, float]:
        """Return the share of new words among the tokens, distinct-n, and the share of repeated tokens."""
        numbers = {"tokens": float(len(ids)), "new_share": 0.0, "repetition": 0.0}
        if ids:
            numbers["new_share"] = sum(id_ >= self.first_new_id for id_ in ids) / len(ids)
            numbers["repetition"] = repetition(ids)
        return {**numbers, **{f"distinct_{n}": distinct(ids, n) for n in _NGRAMS}}


def distinct(ids: Sequence[int], n: int) -> float:
    """Return the share of different n-grams among all (distinct-n); 0 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(ids: Sequence[int], window: int = 32) -> float:
    """Return the share of tokens that stood within the `window` tokens before."""
    return sum(id_ in ids[max(0, i - window) : i] for i, id_ in enumerate(ids)) / max(1, len(ids))


def _warpers(settings: Settings) -> list[Any]:
    """Return transformers' own processors, in the order of its `generate`."""
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    return [
        RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        TemperatureLogitsWarper(settings.temperature),
        TopKLogitsWarper(settings.top_k),
        TopPLogitsWarper(settings.top_p),
    ]


def _end_ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def battery(sampler: Sampler, prompt: str, seed: int, parts: Sequence[str]) -> Iterator[Sample]:
    """Yield the texts of the battery's parts as they are drawn."""
    for part in parts:
        for settings in BATTERY[part]:
            yield from sampler.draw(prompt, settings, seed, part)


def markdown(samples: Sequence[Sample], title: str) -> str:
    """Return the texts as Markdown, new words in bold, and the numbers by temperature."""
    lines = [f"# {title}", "", "New words are **bold**.", ""]
    names = ("tokens", "new_share", "repetition", *(f"distinct_{n}" for n in _NGRAMS))
    lines += ["| temperature | texts | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for temperature, group in by_temperature(samples).items():
        means = [sum(sample.numbers[name] for sample in group) / len(group) for name in names]
        shown = [f"{means[0]:.0f}", *(f"{mean:.3f}" for mean in means[1:])]
        lines.append(f"| {temperature:g} | {len(group)} | " + " | ".join(shown) + " |")
    for sample in samples:
        head = f"{sample.part}, temperature {sample.settings.temperature:g}, seed {sample.seed}"
        lines += ["", f"## {head}", "", _quoted(sample)]
    return "\n".join(lines) + "\n"


def by_temperature(samples: Sequence[Sample]) -> dict[float, list[Sample]]:
    """Return the texts of each temperature, coldest first."""
    found: dict[float, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.settings.temperature):
        found.setdefault(sample.settings.temperature, []).append(sample)
    return found


def _quoted(sample: Sample) -> str:
    text = _escaped(sample.prompt)
    for piece, new in sample.pieces:
        stripped = piece.strip()
        text += piece.replace(stripped, f"**{_escaped(stripped)}**") if new and stripped else _escaped(piece)
    return "\n".join(f"> {line}" if line else ">" for line in text.split("\n"))


def _escaped(text: str) -> str:
    for char in "\\`*_[]<>#|":
        text = text.replace(char, "\\" + char)
    return text


def check_parts(parts: Sequence[str]) -> None:
    """Refuse a part that the battery does not have."""
    unknown = [part for part in parts if part not in BATTERY]
    if unknown:
        raise WakeError(f"sample: the battery has no part {', '.join(unknown)}; use {', '.join(BATTERY)}")
