"""The text beside an export: its model card, and the lines that load it."""

import json
from collections.abc import Mapping
from typing import Any

_LOAD = '''"""Load the base model with these rows on it: python load.py "a prompt"."""

import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, REVISION = {name}, {revision}


def load(folder=Path(__file__).parent, base=BASE, **options):
    """Return model and tokenizer; options go to the base's from_pretrained (dtype, device_map, quantization_config)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base, revision=REVISION, **options)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # before the adapter, or its ids do not exist
    return PeftModel.from_pretrained(model, str(folder)), tokenizer


if __name__ == "__main__":
    model, tokenizer = load()
    inputs = tokenizer(sys.argv[1], return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=True)[0]))
'''
_LINES = {
    "rows": """from load import load   # load.py lies beside this file
model, tokenizer = load()""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)""",
}


def load_script(base_name: str, revision: str | None) -> str:
    """Return load.py for a rows export."""
    return _LOAD.format(name=json.dumps(base_name), revision=repr(revision))


def text(kind: str, record: Mapping[str, Any], step: int, version: str) -> str:
    """Return the model card: what it is, how to load it, and the run's identity."""
    fixed = record["identity"]
    recipe = fixed["recipe"]
    library = "peft" if kind == "rows" else "transformers"
    front = [f"library_name: {library}", "tags: [wake2vec]"]
    if "/" in fixed["base"]["name"] and not fixed["base"]["name"].startswith((".", "/")):
        front.insert(0, f"base_model: {fixed['base']['name']}")
    padding = (
        "\nRows past the last id of the tokenizer fill the tables up to a multiple of 64. Each is the mean of all "
        "others, so that it never scores highest; `generation_config.json` suppresses them.\n"
        if kind == "model"
        else ""
    )
    facts = {
        "base model": f"{fixed['base']['name']}, {fixed['base']['commit']}",
        "new words": f"{fixed['num_new_tokens']:,}, ids {fixed['base_vocab_size']:,} on",
        "trained": f"step {step:,} of {recipe['train']['max_steps']:,}, phase {recipe['phase']}",
        "base held as": f"{recipe['model']['quantization']}, computed in {recipe['model']['compute_dtype']}",
        "text sha256": fixed["text_sha256"],
        "lexicon sha256": fixed["lexicon_sha256"],
        "identity sha256": record["identity_sha256"],
        "stack": record["stack"]["name"],
        "written by": f"wake2vec {version}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{chr(10).join(front)}
---

# {record["run"]}

{fixed["num_new_tokens"]:,} new words for {fixed["base"]["name"]}. Only their rows were trained; everything else is the
base model's, unchanged.

```python
{_LINES[kind]}
```

| | |
| --- | --- |
{table}
{padding}"""
