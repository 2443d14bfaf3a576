"""Load an export as a user would, without this package, and keep its logits: run in either stack's Python.

python loading.py JOBS: a JSON file, a list of {kind, folder, base, text, out}
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(kind: str, folder: Path, base: str):  # type: ignore[no-untyped-def]
    """Return model and tokenizer, as the model card says."""
    if kind == "model":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.load(folder, base, dtype=torch.float32)


def main() -> None:
    """Do every job."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        one(**job)


def one(kind: str, folder: str, base: str, text: str, out: str) -> None:
    """Write ids, logits, round trip and a greedy continuation as JSON."""
    model, tokenizer = load(kind, Path(folder), base)
    model.eval()
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        said = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    content = {"ids": ids, "logits": logits.tolist(), "back": tokenizer.decode(ids), "said": said, "wake2vec": False}
    content["wake2vec"] = any(name.split(".")[0] == "wake2vec" for name in sys.modules)
    Path(out).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
