"""The `wake2vec` command."""

import errno
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
import typer

from wake2vec import __version__, config, console, rundir
from wake2vec.errors import Stopped, WakeError

if TYPE_CHECKING:
    from wake2vec.doctor import Check

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_NO_MEMORY = ("DefaultCPUAllocator", "can't start new thread")
_NO_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_OUT_OF_GPU_MEMORY = (
    "out of memory on the GPU ({}); free the card of other programs (nvidia-smi shows them) or use a larger one, then "
    "give the same command again: a run goes on from its last sentry"
)
_OUT_OF_MEMORY = (
    "memory: this machine, or the limit it runs under, has no more; free some or raise the limit, then give the same "
    "command again: a run goes on from its last sentry"
)
_SPARE_BYTES = 1 << 26
"""Less than this to be had is a lack of memory."""
_TYPER_INTERRUPT = 130
"""What Typer returns, in place of letting a KeyboardInterrupt through."""
_AGAIN_S = 0.01
DONE, USER, USAGE, BUG, STOPPED = 0, 1, 2, 70, 75
_interrupted: list[int] = []
"""The signals that came outside of training."""

app = typer.Typer(
    help="Teach a frozen causal language model new words, reproducibly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunsOption = Annotated[Path, typer.Option("--runs", envvar="WAKE2VEC_RUNS", help="The folder where runs lie.")]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        envvar="WAKE2VEC_GPU_MEMORY",
        help="Keep within so much of the GPU's memory, as on a smaller card: 15GiB.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a TOML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key; the value in TOML. Repeatable.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or the path of its folder.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wake2vec {__version__}")
        raise typer.Exit


@app.callback()
def _wake2vec(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    name: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", envvar="WAKE2VEC_RUN", help="The run's name; by default the recipe's."),
    ] = None,
    runs: RunsOption = Path("runs"),
    allow_stack_change: Annotated[
        bool, typer.Option("--allow-stack-change", help="Continue a run begun under other versions, on record.")
    ] = False,
    replan: Annotated[
        bool, typer.Option("--replan", help="Continue with a new plan for the memory that is there, on record.")
    ] = False,
    gpu_memory: GpuMemoryOption = None,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="tensorboard, wandb or trackio (extras). Repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a run, continue it where it stopped, or report it as done."""
    recipe_name, parsed = config.load_recipe(recipe, overrides or [])
    run = rundir.new_run(runs, name or recipe_name)
    limit_bytes = config.parse_size(gpu_memory, "--gpu-memory") if gpu_memory else None
    from wake2vec import report, trackers
    from wake2vec.environment import check_stack
    from wake2vec.resume import Options
    from wake2vec.train import train as train_run

    check_stack()
    options = Options(allow_stack_change=allow_stack_change or None, replan=replan, gpu_memory_bytes=limit_bytes)
    tracked = trackers.Trackers(track or [], run, parsed.model_dump())
    live = report.LivePage(run)
    with tracked, console.TrainConsole([live, tracked]) as shown:
        try:
            records = train_run(parsed, run, shown, options)
        finally:
            live.close()
        if not report.is_current(run):
            try:
                shown.say(f"report: {report.write(run)[0]}")
            except WakeError as error:  # of a run begun before reports; it is done all the same
                shown.say(f"no report: {error}")
    _show_result(run, records, as_json)


def _show_result(run: rundir.RunDir, records: list[dict[str, Any]], as_json: bool) -> None:
    def found(key: str) -> list[float | None]:
        return [record[key] for record in records if key in record] or [None]  # a damaged line is left out

    def last(key: str) -> float | None:
        return found(key)[-1]

    result = {
        "run": str(run.path),
        "step": records[-1]["step"],
        "val/bits_per_char": {
            "before": found("val/bits_per_char")[0],
            "after": last("val/bits_per_char"),
            "base": last("base/bits_per_char"),
            "shuffled": last("control/bits_per_char"),
        },
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    names = {
        "before": "new rows as they started",
        "after": "new rows as trained",
        "base": "base model with its own tokenizer",
        "shuffled": "trained rows shuffled among the words",
    }
    values = result["val/bits_per_char"].items()
    rows = [[names[key], "not on record" if value is None else f"{value:.4f}"] for key, value in values]
    console.print_table(f"{run.path}: held-out text after step {result['step']}", ["", "bits/char"], rows)


@app.command()
def sentries(
    name: RunArgument,
    imports: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE", help="Take rows from a .pt of the earlier scripts. Repeatable."),
    ] = None,
    to_pt: Annotated[
        int | None, typer.Option("--to-pt", metavar="STEP", help="Write a sentry as the earlier scripts' fp16 .pt.")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove sentries that the recipe would not keep.")] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List, verify, import, convert or prune sentries."""
    run = rundir.find_run(runs, name)
    from wake2vec import keeping

    for path in imports or []:
        typer.echo(keeping.import_pt(run, path), err=True)
    if to_pt is not None:
        typer.echo(keeping.export_pt(run, to_pt), err=True)
    if prune:
        typer.echo(keeping.prune(run), err=True)
    listed = keeping.list_sentries(run)
    if as_json:
        typer.echo(json.dumps(listed))
        return
    rows = [
        [
            entry["file"],
            "" if entry["step"] is None else str(entry["step"]),
            "" if entry["val_loss_nats"] is None else f"{entry['val_loss_nats']:.4f}",
            f"{entry['size_bytes'] / 2**20:.1f}",
            _age(entry["saved_unix_s"]),
            entry["state"],
        ]
        for entry in listed
    ]
    console.print_table(f"{run.path}", ["sentry", "step", "val nats", "MiB", "age", "state"], rows)


@app.command("report")
def write_report(name: RunArgument, runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """Write plots, tables, numbers and one page from a run's folder; needs no GPU and no base model."""
    run = rundir.find_run(runs, name)
    from wake2vec import report

    written = [str(path) for path in report.write(run)]
    typer.echo(json.dumps({"run": str(run.path), "files": written}) if as_json else "\n".join(written))


@app.command()
def sample(
    name: RunArgument,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Continue this instead of the battery's line. Repeatable.")
    ] = None,
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="A part of the battery: one, sweep, three, long. Repeatable.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.01, help="One text a prompt at this temperature instead.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="With --temperature.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same texts.")] = 42,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write Markdown here; by default report/samples.md.")
    ] = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Draw texts from a run's newest rows: the battery of the earlier runs, or prompts of your own."""
    run = rundir.find_run(runs, name)
    from wake2vec import sample

    sample.check_parts(parts or [])
    sampler = sample.Sampler(run, lambda message: typer.echo(message, err=True))
    drawn = []
    for prompt in prompts or [sample.PROMPT]:
        if temperature is None:
            texts = sample.battery(sampler, prompt, seed, parts or list(sample.BATTERY))
        else:
            texts = iter(sampler.draw(prompt, sample.Settings(temperature, max_new_tokens=max_new_tokens), seed))
        for text in texts:
            drawn.append(text)
            if not as_json:
                numbers = ", ".join(f"{key} {value:.3g}" for key, value in text.numbers.items())
                title = f"{text.part}, temperature {text.settings.temperature:g}: {numbers}"
                console.print_text(title, text.prompt, text.pieces)
    target = out or run.report / "samples.md"
    rundir.make_folder(target.parent)
    rundir.write_file(target, [sample.markdown(drawn, sampler.title).encode()])
    typer.echo(f"{len(drawn)} texts: {target}", err=True)
    if as_json:
        typer.echo(json.dumps([text.as_json() for text in drawn]))


@app.command("export")
def write_export(
    name: RunArgument,
    kind: Annotated[str, typer.Option("--format", help="rows: a PEFT adapter; model: a whole model.")] = "rows",
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder; by default export/FORMAT in the run's.")
    ] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload it to the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is public.")] = False,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Write the rows, or the whole model, in a form that other tools load; checked before it gets its name."""
    run = rundir.find_run(runs, name)
    from wake2vec import export

    if kind not in export.FORMATS:
        raise WakeError(f"--format {kind}: no such format; use {' or '.join(export.FORMATS)}")

    def say(message: str) -> None:
        typer.echo(message, err=True)

    folder = export.export(run, kind, out, say)
    address = None if push is None else export.push(folder, push, public=public, say=say)
    typer.echo(json.dumps({"folder": str(folder), "address": address}) if as_json else str(address or folder))


@app.command()
def lexicon(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A UTF-8 text file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the list here and the scored table beside it (.tsv).")
    ] = None,
    min_count: Annotated[int, typer.Option("--min-count", min=1, help="Occurrences a word needs.")] = 1,
    max_zipf: Annotated[
        float, typer.Option("--max-zipf", help="Leave out words more frequent in general English than this.")
    ] = 3.0,
    check: Annotated[Path | None, typer.Option("--check", metavar="LEXICON", help="Check a lexicon instead.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="With --check: a model whose vocabulary may know the words already.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Extract a lexicon from a text, most distinctive words first; or check one against a text."""
    from wake2vec import distinct
    from wake2vec.data import read_text

    content = read_text(text)
    if check is not None:
        _check_lexicon(check, content, base, as_json)
        return
    entries = distinct.extract(content, min_count=min_count, max_zipf=max_zipf)
    words = [entry.word for entry in entries if not entry.dropped]
    if not words:
        raise WakeError(f"lexicon {text}: none of its {len(entries):,} word types is left; raise --max-zipf")
    if out is not None:
        rundir.write_file(out, ["".join(f"{word}\n" for word in words).encode()])
        rundir.write_file(out.with_suffix(".tsv"), [distinct.table(entries).encode()])
        typer.echo(f"{len(words):,} of {len(entries):,} word types: {out}, {out.with_suffix('.tsv')}", err=True)
    elif as_json:
        typer.echo(json.dumps([{**vars(entry), "score": round(entry.score, 3)} for entry in entries]))
    else:
        typer.echo("\n".join(words))


def _check_lexicon(path: Path, text: str, base_name: str | None, as_json: bool) -> None:
    from wake2vec import distinct
    from wake2vec.lexicon import read_words

    vocabulary = None
    if base_name is not None:
        from wake2vec import base

        vocabulary = base.load_tokenizer(base.identify(base_name, base_name, None)).get_vocab()
    found = distinct.check(read_words(path), text, vocabulary)
    if as_json:
        typer.echo(json.dumps(vars(found)))
        return
    rows = [
        [name, "not asked (--base)" if words is None else f"{len(words):,}", " ".join((words or [])[:8])]
        for name, words in (
            ("never whole in the text", found.unseen),
            ("tokens already", found.known),
            ("fragments of other words", found.fragments),
        )
    ]
    console.print_table(f"{path}: {found.num_words:,} words", ["", "words", "for example"], rows)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    gpu_memory: GpuMemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would load and take, and how its steps would be cut up; loads no weights."""
    _, parsed = config.load_recipe(recipe, overrides or [])
    limit_bytes = config.parse_size(gpu_memory, "--gpu-memory") if gpu_memory else None
    from wake2vec import outlook

    found = outlook.outlook(parsed, limit_bytes, lambda message: typer.echo(message, err=True))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for line in outlook.lines(found):
        typer.echo(line)
    rows = [[part, f"{size / 2**30:.2f}", f"{size / 1e9:.2f}"] for part, size in found["bytes"].items()]
    console.print_table("", ["part", "GiB", "GB"], rows)


@app.command()
def fetch(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Download a base model ahead of time."""
    _, parsed = config.load_recipe(recipe, overrides or [])
    from wake2vec import base, hub, preflight

    if parsed.model.base.startswith("demo:"):
        raise WakeError(f"recipe {recipe}: its base model is made at first use; nothing to fetch")
    found = base.identify(parsed.model.base, parsed.model.base, None)
    if found.revision is not None:
        preflight.check_download(parsed, found)
        with console.TrainConsole() as shown:
            folder = hub.download(found.name, found.commit, shown.say)
        typer.echo(f"{found.name} {found.commit}: {folder}", err=True)


@app.command()
def doctor(
    runs: RunsOption = Path("runs"),
    gpu: Annotated[bool, typer.Option("--gpu", help="Also train a tiny run on the card; about a minute.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether a run can start here, and the mend."""
    from wake2vec import doctor

    found = []
    for check in itertools.chain(doctor.checks(runs), _smoke() if gpu else ()):
        found.append(check)
        if not as_json:
            typer.echo(f"{check.state:5}{check.what:12}{check.found}")
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in found]))
    doctor.raise_if_failed(found)


def _smoke() -> Iterator["Check"]:
    import torch

    from wake2vec import smoke

    yield from smoke.checks(torch.device("cuda"))


def _age(saved_unix_s: float) -> str:
    seconds = max(0.0, time.time() - saved_unix_s)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def main() -> NoReturn:
    """Run the command; exit 0 done, 1 the user can mend it, 2 usage, 70 a bug, 75 stopped with everything saved."""
    signal.signal(signal.SIGTERM, _interrupt)  # training has its own: this is for imports and reports
    sys.unraisablehook = _interrupt_again
    code = _run()
    _ignore_signals()
    sys.exit(code)


def _interrupt(number: int, _frame: types.FrameType | None) -> NoReturn:
    _interrupted.append(number)
    raise KeyboardInterrupt


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again that came in a finalizer or a weak reference's callback: what is raised there is dropped."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
    elif not isinstance(unraisable.exc_value, Stopped):  # that one is remembered by training
        sys.__unraisablehook__(unraisable)


def _ignore_signals() -> None:
    """Let no signal change how a command ends that is ending."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _run() -> int:
    try:
        if app(standalone_mode=False) == _TYPER_INTERRUPT:
            raise KeyboardInterrupt
    except click.ClickException as error:
        error.show()
        return USAGE
    except WakeError as error:
        return _fail(str(error))
    except (Stopped, KeyboardInterrupt, click.Abort):
        _ignore_signals()
        return STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except MemoryError:
        return _fail(_OUT_OF_MEMORY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return _fail(_OUT_OF_MEMORY)
        if error.filename is None and error.errno not in _DISK_ERRORS:
            return _bug()
        return _fail(f"{error.filename or 'disk'}: {error.strerror}; check the disk, its space and the file's owner")
    except Exception as error:  # the one place where every exception ends
        if _has_sign(error, _NO_GPU_MEMORY):
            return _fail(_OUT_OF_GPU_MEMORY.format(str(error).partition("\n")[0].rstrip(".")))
        if _has_sign(error, _NO_MEMORY) or _short_of_memory():
            return _fail(_OUT_OF_MEMORY)
        return _bug()
    return DONE


def _has_sign(error: Exception, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _short_of_memory() -> bool:
    """Say whether memory has run out, whatever a library made of that."""
    try:
        bytearray(_SPARE_BYTES)
    except MemoryError:
        return True
    return False


def _fail(message: str) -> int:
    print(f"wake2vec: {message}", file=sys.stderr)
    return USER


def _bug() -> int:
    if _interrupted:  # native code may make another error of the one raised in it
        return STOPPED
    traceback.print_exc()
    print(
        "wake2vec: this is a bug, not your mistake; nothing saved is lost. Please report the lines above.",
        file=sys.stderr,
    )
    return BUG
