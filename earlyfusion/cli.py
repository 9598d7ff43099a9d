"""The command line: each command turns its options into calls of the public API. Typer is the only
large library that is imported here. Commands import torch, Rich and the model after their options
have been checked, so that `--help`, completion and wrong options are answered at once."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from earlyfusion import __version__
from earlyfusion.devices import (
    DEVICES,
    FLOAT_DTYPES,
    WEIGHT_DTYPES,
    dtype_name,
    resolve_device,
    torch_dtype,
)
from earlyfusion.errors import EarlyFusionError, PromptError, SettingError, shortened
from earlyfusion.files import expanded, is_full_disk, signals_wait
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.options import FieldsOf, bytes_option, whole_option, with_options
from earlyfusion.serve.options import DELIVERIES, ServeOptions

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon
    from earlyfusion.content import Image, Prompt
    from earlyfusion.serve.process import Child, RemoteEngine
    from earlyfusion.serve.spawn import LoadPlan

Mode = Literal["crop", "fit"]
Layout = Literal["hf", "meta"]
Shape = Literal["tiny", "mini", "110m", "1b", "7b"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as a shell shows SIGPIPE
_MAX_PROMPT_BYTES = 10_000_000
_DEMO_IMAGE = Path(__file__).parent / "pretrained" / "mini" / "examples" / "strawberry.png"
_DEMO_QUESTION = "What is this?"
_DEMO_QUESTION_KO = "이게 뭐야?"
_DEMO_IMAGE_PROMPT = "Draw a red apple."
_DEMO_LIST = "Show me three different fruits. Write each name before its picture."
_GALLERY = Path("gallery.png")
_GALLERY_PROMPTS = (
    "Draw a cat.",
    "Draw a house.",
    "Draw an elephant.",
    "Draw a red apple.",
    "Draw a rainbow.",
    "해바라기를 그려 줘.",
)
_MAX_SEEDS = 64
_DEVICE_EXAMPLES = (*DEVICES, "cuda:0", "cuda:1")


def _starting_with(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _complete_models(incomplete: str) -> list[str]:
    """mini, and the folders that complete the typed path."""
    start = Path(incomplete if incomplete.endswith("/") else os.path.dirname(incomplete))
    try:
        folders = [f"{path}/" for path in sorted(expanded(start).iterdir()) if path.is_dir()]
    except OSError:
        folders = []
    return _starting_with(incomplete, ["mini", *folders])


def _complete_devices(incomplete: str) -> list[str]:
    return _starting_with(incomplete, _DEVICE_EXAMPLES)


def _complete_dtypes(incomplete: str) -> list[str]:
    return _starting_with(incomplete, WEIGHT_DTYPES)


def _complete_float_dtypes(incomplete: str) -> list[str]:
    return _starting_with(incomplete, FLOAT_DTYPES)


def _complete_recipes(incomplete: str) -> list[str]:
    from earlyfusion.recipes.run import RECIPES

    files = [str(path) for path in sorted(Path().glob("*.py"))]
    return _starting_with(incomplete, [*RECIPES, *files])


def _complete_fields(ctx: typer.Context, incomplete: str) -> list[str]:
    """The fields of the recipe on the command line; after =, the possible values of a field."""
    from earlyfusion.recipes.run import fields_of

    fields, words = fields_of(ctx.params["recipe"]), ctx.params.get("fields") or []
    # bash, unlike other shells, splits words at "=", and passes a lone "=" as an empty word.
    if not incomplete and words[-1:] and words[-1] in fields:
        return list(_values_of(words[-1], fields))
    if words[-1:] == ["="]:
        return _starting_with(incomplete, _values_of(words[-2] if words[1:] else "", fields))
    name, separator, _ = incomplete.partition("=")
    if not separator:
        return _starting_with(incomplete, [f"{field}=" for field in fields])
    return _starting_with(incomplete, [f"{name}={value}" for value in _values_of(name, fields)])


def _values_of(name: str, fields: dict[str, tuple[str, Any, str]]) -> Iterable[str]:
    """The values to suggest for a field; `fields` are those of `recipes.run.fields_of`."""
    if fields.get(name, ("",))[0] == "bool":
        return "true", "false"
    suggestions = {"device": _DEVICE_EXAMPLES, "precision": ("fp32", "bf16"), "model": ("mini",)}
    return suggestions.get(name.rpartition(".")[2], ())


ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="mini (embedded), a model folder, or a hub id.",
        autocompletion=_complete_models,
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1 …", autocompletion=_complete_devices)
]
Precision = Annotated[
    str,
    typer.Option("--dtype", help=", ".join(WEIGHT_DTYPES), autocompletion=_complete_dtypes),
]
Fit = Annotated[
    bool | None,
    typer.Option(
        "--fit/--crop",
        help="Fit images into a square with a border, or crop their centre.",
        show_default="the model's own",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Compare files with the model's checklist; info and convert look for NaN too.",
    ),
]
Seed = Annotated[int | None, whole_option("The same seed gives the same bytes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ImageFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder for generated PNG files.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]

_MODES = ("crop", "fit")
Sampling = Annotated[
    dict[str, Any],
    FieldsOf(
        "generation/settings.py",
        "SamplingParams",
        unset="the model's own",
        shown_defaults={"seed": "random"},
        omitted={"logprobs", "logits_processors"},
    ),
]
Rows = Annotated[
    dict[str, Any], FieldsOf("data/rows.py", "RowSettings", flags={"patterns": "--pattern"})
]
Encoding = Annotated[
    dict[str, Any],
    FieldsOf(
        "data/encoding.py",
        "EncodingSettings",
        hidden={"prompt_images"},
        flags={"pair_seed": "--seed"},
        choices={
            "prompt_images": _MODES,
            "answer_images": _MODES,
            "resize_mode": _MODES,
            "pairs": ("turns", "document"),
        },
    ),
]


CacheBytes = Annotated[
    int | None,
    bytes_option("Memory for keys and values, such as 2GB.", unset="a share of what is free"),
]


@dataclass
class Loading:
    """The options of a model that answers prompts."""

    model: ModelName = "mini"
    device: Device = "auto"
    dtype: Precision = "auto"
    fit: Fit = None
    verify: Verify = True
    cache_bytes: CacheBytes = None

    @property
    def description(self) -> str:
        """The model, with the options that change its replies."""
        dtype = None if self.dtype == "auto" else self.dtype
        options = {"dtype": dtype, "fit": self.fit}
        changed = [f"{name}={value}" for name, value in options.items() if value is not None]
        return " ".join([self.model, *changed])


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *lines])


app = typer.Typer(
    name="earlyfusion",
    help="Text and images in any order in, text and images in any order out.",
    epilog=_examples("earlyfusion demo", 'earlyfusion generate "Draw a red apple." --output image'),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, or 2 for a user's mistake, 130 if the user stopped
    it, 141 if whatever read its output has ended (a broken pipe)."""
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        # A chat reports a line that is not UTF-8, and continues.
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        code = app(arguments, prog_name="earlyfusion", standalone_mode=False)
        sys.stdout.flush()
    except EarlyFusionError as error:
        return _print_error(str(error))
    except typer.TyperException as error:
        return _print_usage_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # Typer turns a broken pipe into SystemExit(1), and also ends a completion with SystemExit.
        if isinstance(error, SystemExit) and error.code != 1:
            return int(error.code or 0)
        _discard_output()
        return _BROKEN_PIPE
    except OSError as error:
        if not is_full_disk(error):
            raise
        _discard_output()
        return _print_error("the output cannot be written, as the disk is full: make room")
    return code if isinstance(code, int) else 0


def _replace_closed_streams() -> None:
    """Replace standard streams that were closed before the start (`<&-`), which are None in Python,
    by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _discard_output() -> None:
    # Python flushes stdout when it exits, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(is_set: bool) -> None:
    if is_set:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        'earlyfusion generate "What is this?" --image cat.png',
        'earlyfusion generate "Draw a red apple." --output image --out out/ --seed 0',
        'earlyfusion generate "<image> <image> What are these?" --image a.png --image b.png --json',
        'curl -s https://example.org/a.png | earlyfusion generate "What is this?" --image -',
        "earlyfusion generate - < question.txt",
    )
)
@with_options
def generate(
    sampling: Sampling,
    loading: Loading,
    prompt: Annotated[
        str | None,
        typer.Argument(help="A text; <image> marks the place of each --image; - reads a pipe."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file with the prompt.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="An image file, or - for a pipe. May be repeated.")
    ] = None,
    output: Annotated[Output, typer.Option(help="What the reply may contain.")] = "auto",
    out: ImageFolder = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Answer one prompt: print the text, and write images to new PNG files.

    An image that is not square is cropped to its centre, or fitted with a border
    (--fit).
    """
    from earlyfusion.content import as_messages, fill_placeholders
    from earlyfusion.terminal import OutputFolder, Screen, answer, reply_json

    images = image or []
    if "" in images:
        raise SettingError("--image is empty: give an image file, or leave the option out")
    _check_pipe([prompt or "", *images])
    text = _read_prompt(prompt, prompt_file)
    messages = as_messages(fill_placeholders(text, [_open_image(name) for name in images]))
    params = _sampling_params(sampling)
    output_folder = OutputFolder(out)
    if output != "text":
        output_folder.check()
    chameleon, screen = _load(**asdict(loading), quiet=as_json), Screen(as_json)
    reply = answer(chameleon, messages, output, params, output_folder, screen)
    if as_json:
        settings = asdict(params.resolved(chameleon.defaults))
        request = {"seed": settings.pop("seed"), "model": loading.model, "output": output}
        _print_json(reply_json(reply, output_folder.path_of) | request | {"settings": settings})


@app.command(
    epilog=_examples(
        "earlyfusion chat",
        "earlyfusion chat --resume conversation",
        "echo Hello | earlyfusion chat --output text",
    )
)
@with_options
def chat(
    sampling: Sampling,
    loading: Loading,
    resume: Annotated[
        Path | None, typer.Option(help="A folder that /save wrote.", show_default=False)
    ] = None,
    output: Annotated[Output, typer.Option(help="What a reply may contain.")] = "auto",
    out: ImageFolder = Path("out"),
) -> int:
    """Chat with the model in the terminal. Commands: /image /undo /reset /save /load /quit."""
    from earlyfusion.chat import Conversation
    from earlyfusion.terminal import OutputFolder

    params = _sampling_params(sampling)
    output_folder = OutputFolder(out)
    if output != "text":
        output_folder.check()
    conversation = Conversation(_load(**asdict(loading)), output, params, output_folder)
    if resume is not None:
        conversation.resume(resume)
    return conversation.run()


@app.command(
    epilog=_examples(
        "earlyfusion batch requests.jsonl -o replies",
        "earlyfusion batch requests.jsonl -o replies --output text --temperature 0 --json",
    )
)
@with_options
def batch(
    sampling: Sampling,
    loading: Loading,
    requests: Annotated[Path, typer.Argument(help='JSON lines such as {"prompt": "Draw a cat."}.')],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the replies.")],
    output: Annotated[Output, typer.Option(help="For lines without an output.")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Answer many prompts at once. An interrupted run continues if started again.

    A line has a prompt (a text, a list of parts, or a list of messages), and
    optionally id, images, output, seed and other sampling fields, which take
    precedence over options. Image paths are relative to the folder of the file.
    """
    from earlyfusion.batch import Replies, answer_all, read_jobs
    from earlyfusion.terminal import progress_bar

    jobs = read_jobs(requests, output, sampling, loading.description)
    with Replies(out) as replies:
        remaining = replies.remaining(jobs)
        try:
            chameleon = _load(**asdict(loading), quiet=as_json)
            with progress_bar(as_json) as bar:
                done = len(jobs) - len(remaining)
                task = bar.add_task("answering", total=len(jobs), completed=done)
                answer_all(chameleon, remaining, replies, lambda: bar.advance(task))
        except KeyboardInterrupt:
            print("Stopped: run the same command again to continue.", file=sys.stderr)
            raise
    return _report_batch(out, len(jobs), len(remaining), replies.num_errors, as_json)


def _report_batch(out: Path, jobs: int, new: int, failed: int, as_json: bool) -> int:
    """Print the numbers of a batch: of all its jobs, those of this run, and those that failed.
    Returns its exit code."""
    from earlyfusion.content import counted

    if as_json:
        counts = {"replies": jobs - failed, "new": new - failed, "errors": failed}
        _print_json({"path": str(out)} | counts)
    else:
        print(f"{out / 'replies.jsonl'}: {counted(new - failed, 'new reply', 'new replies')}")
    if failed:
        sentence = f"{counted(failed, 'request')} of {jobs:,} failed: see {out / 'errors.jsonl'}"
        print(f"Error: {sentence}", file=sys.stderr)
    return 2 if failed else 0


@app.command(epilog=_examples("earlyfusion demo", "earlyfusion demo --out images --seed 3"))
def demo(
    out: ImageFolder = Path("earlyfusion-demo"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """A short tour with the embedded model: it names an image, generates one, and mixes both."""
    from earlyfusion.content import Image, fill_placeholders
    from earlyfusion.terminal import OutputFolder, Screen, answer, reply_json

    output_folder = OutputFolder(out)
    output_folder.check()
    image, params = Image.open(_DEMO_IMAGE), _sampling_params({"seed": seed})
    chameleon, screen = _load("mini", device, as_json), Screen(as_json)
    tour: list[tuple[str, Prompt, Output]] = [
        (_DEMO_QUESTION, fill_placeholders(_DEMO_QUESTION, [image]), "text"),
        (_DEMO_QUESTION_KO, fill_placeholders(_DEMO_QUESTION_KO, [image]), "text"),
        (_DEMO_IMAGE_PROMPT, _DEMO_IMAGE_PROMPT, "image"),
        (_DEMO_LIST, _DEMO_LIST, "interleaved"),
    ]
    steps = []
    screen.show_image(image)
    for text, prompt, output in tour:
        screen.line(f"\n> {text}")
        reply = answer(chameleon, prompt, output, params, output_folder, screen)
        steps.append({"prompt": text} | reply_json(reply, output_folder.path_of))
    screen.line(f"\nThe images are in {out}. Next: earlyfusion chat")
    if as_json:
        _print_json({"steps": steps, "seed": params.seed, "out": str(out)})


@app.command(
    epilog=_examples(
        "earlyfusion gallery",
        'earlyfusion gallery "Draw a cat." "Draw a tent." --count 8 -o cats.webp',
    )
)
@with_options
def gallery(
    loading: Loading,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts, one for each row of the sheet.", show_default="six of our own"
        ),
    ] = None,
    count: Annotated[int, whole_option("Images of each request.")] = 8,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png or .webp file.")] = _GALLERY,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Generate images of several prompts with the first seeds, unselected, on one sheet."""
    from earlyfusion.files import check_writable, path_exists_error, write_whole
    from earlyfusion.terminal import Screen, grid_writer, image_grid

    texts, first_seed = list(prompts or _GALLERY_PROMPTS), 0 if seed is None else seed
    if not 1 <= count <= _MAX_SEEDS:
        raise SettingError(f"--count {count} is not possible: give 1 to {_MAX_SEEDS}")
    write = grid_writer(out)
    if os.path.lexists(out) and not overwrite:
        raise path_exists_error(out)
    check_writable(out.parent)
    seeds = list(range(first_seed, first_seed + count))
    chameleon, screen = _load(**asdict(loading), quiet=as_json), Screen(as_json)
    rows = []
    for text in texts:
        sampling = [SamplingParams(seed=number) for number in seeds]
        replies = chameleon.generate_batch([text] * count, output="image", sampling=sampling)
        rows.append([reply.images[0] for reply in replies])
        screen.line(f"\n> {text}")
        screen.show_wide_image(image_grid(rows[-1:]))
    write_whole(out, write(image_grid(rows)), overwrite)
    screen.line(f"\n{out}: seeds {seeds[0]} to {seeds[-1]} from left to right")
    if as_json:
        _print_json({"path": str(out), "prompts": texts, "seeds": seeds, "model": loading.model})


@app.command(
    epilog=_examples(
        "earlyfusion encode a.png b.png -o codes.safetensors",
        "earlyfusion encode wide.png -o wide.safetensors --fit --json",
    )
)
def encode(
    images: Annotated[
        list[str], typer.Argument(help="Image files, or - for a pipe.", metavar="IMG")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors or .npy file.")],
    fit: Fit = None,
    mode: Annotated[
        Mode | None, typer.Option(help="crop or fit, as --crop and --fit.", hidden=True)
    ] = None,
    model: ModelName = "mini",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Encode images to codes: one tensor "codes" of n x h x w integers."""
    from earlyfusion.checkpoints.codes import check_name, save_codes
    from earlyfusion.files import check_writable, path_exists_error

    if mode is not None and fit not in (None, mode == "fit"):
        raise SettingError(f"--mode {mode} and --{'fit' if fit else 'crop'} differ: give one")
    check_name(out)
    if os.path.lexists(out) and not overwrite:
        raise path_exists_error(out)
    _check_pipe(images)
    opened_images = [_open_image(name) for name in images]
    check_writable(out.parent)
    codes = _load(model, device, as_json, fit=fit).image_tokenizer.encode(opened_images, mode)
    save_codes(out, codes.cpu().numpy(), overwrite)
    if as_json:
        _print_json({"path": str(out), "shape": list(codes.shape), "images": images})
    else:
        print(f"{out}: {' x '.join(map(str, codes.shape))} codes")


@app.command(epilog=_examples("earlyfusion decode codes.safetensors -o images"))
def decode(
    codes: Annotated[Path, typer.Argument(help="A file that `earlyfusion encode` wrote.")],
    out: ImageFolder = Path("out"),
    model: ModelName = "mini",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Decode a file of codes to images."""
    from earlyfusion.checkpoints.codes import load_codes
    from earlyfusion.terminal import OutputFolder, Screen, decode_images

    output_folder, codes_nhw = OutputFolder(out), load_codes(codes)
    output_folder.check()
    chameleon, screen = _load(model, device, as_json), Screen(as_json)
    paths = []
    for image in decode_images(chameleon, codes_nhw):
        paths.append(output_folder.save(image))
        screen.show_image(image, paths[-1])
    if as_json:
        _print_json({"images": [str(path) for path in paths]})


@dataclass
class Conversion:
    """The options for the parts of a converted model."""

    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer.", show_default="the model's folder"),
    ] = None
    image_tokenizer: Annotated[
        Path | None,
        typer.Option(help="VQ-GAN to add: a tokenizer folder, a vqgan.ckpt or a model."),
    ] = None
    shards: Annotated[
        int | None,
        whole_option(
            "Number of weight files.", unset="hf: files under 5 GB; meta: as in the source"
        ),
    ] = None
    verify: Verify = True


@app.command(
    epilog=_examples(
        "earlyfusion convert models/7b chameleon-7b --to hf --tokenizer tokenizer",
        "earlyfusion convert chameleon-7b models/7b --to meta --shards 2",
        "earlyfusion convert lumina lumina-whole --to hf --tokenizer t --image-tokenizer t",
    )
)
@with_options
def convert(
    source: Annotated[str, typer.Argument(help="mini, a model folder, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[Layout, typer.Option(help="transformers' layout, or Meta's.")],
    conversion: Conversion,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"dtype of the transformer: {', '.join(FLOAT_DTYPES)}.",
            autocompletion=_complete_float_dtypes,
            show_default="unchanged",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in another layout, in another number of files, or with a VQ-GAN added."""
    from earlyfusion.terminal import show_progress, spinner

    name = None if dtype is None else dtype_name("dtype", dtype, FLOAT_DTYPES)
    with spinner(f"opening {source}", as_json):
        from earlyfusion.checkpoints.convert import convert as convert_model

    with show_progress("converting", as_json) as progress:
        new_dtype = None if name is None else torch_dtype(name)
        convert_model(source, target, to, dtype=new_dtype, progress=progress, **asdict(conversion))
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in sorted(target.rglob("*.*"))}
    if as_json:
        return _print_json({"path": str(target), "layout": to, "file_bytes": sizes})
    for file, size in sizes.items():
        print(f"{file:<36}{size:>16,}")


class _TrainCommand(TyperCommand):
    """A command whose help lists the recipes, or with a recipe the fields of that recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if {"-h", "--help"} & set(args) and not ctx.resilient_parsing:
            from earlyfusion.recipes.run import RECIPES, help_text, summary

            recipes = [arg for arg in args if not arg.startswith("-") and "=" not in arg]
            if recipes:
                print(help_text(recipes[0]))
                ctx.exit()
            summaries = [f"{name}: {summary(name)}" for name in RECIPES]
            more = "earlyfusion train RECIPE --help lists the fields of a recipe."
            self.epilog = "\n\n".join([self.epilog or "", "Recipes:", *summaries, more])
        return super().parse_args(ctx, args)


@app.command(
    cls=_TrainCommand,
    epilog=_examples(
        "earlyfusion train mini_transformer steps=200",
        "earlyfusion train my_recipe.py run.out=runs/mine",
        "earlyfusion train pretrain_34b --plan",
    ),
)
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or a Python file.", autocompletion=_complete_recipes),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE", help="Fields to change.", autocompletion=_complete_fields
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Only estimate memory, speed and days on many GPUs.")
    ] = False,
) -> None:
    """Run a training recipe. An interrupted run continues if started again."""
    from earlyfusion.recipes.run import plan, run

    if plan_only:
        print(plan(recipe, fields or []))
    else:
        run(recipe, fields or [])


@app.command(
    epilog=_examples(
        "earlyfusion tokenize captions.jsonl -o shards",
        "earlyfusion tokenize 'data/*.parquet' org/name -o shards --workers 8 --model ./my-model",
    )
)
@with_options
def tokenize(
    rows: Rows,
    encoding: Encoding,
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, globs or hub ids.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the token shards.")],
    workers: Annotated[int, whole_option("Number of processes, or of actors with --ray.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Use the cluster of RAY_ADDRESS.")] = False,
    shard_rows: Annotated[int, whole_option("Number of rows per shard.")] = 2048,
    model: ModelName = "mini",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Tokenize a corpus of text and images for training.

    An interrupted run continues if started again.
    """
    from earlyfusion.files import check_writable
    from earlyfusion.terminal import show_progress, spinner

    check_writable(out)
    with spinner(f"opening {' '.join(sources)}", as_json):
        from earlyfusion.checkpoints.detect import locate
        from earlyfusion.data.encoding import EncodingSettings
        from earlyfusion.data.rows import RowSettings
        from earlyfusion.data.shard_maker import Job
        from earlyfusion.data.tokenize import tokenize as make_shards

        job = Job(
            sources=tuple(sources),
            out=out,
            model=locate(model),
            device=str(resolve_device(device)),
            rows_a_shard=shard_rows,
            rows=RowSettings(**rows),
            encoding=EncodingSettings(**encoding),
        )
    with show_progress("tokenizing", as_json) as progress:
        summary = make_shards(job, workers, ray, progress=progress)
    if as_json:
        return _print_json(asdict(summary) | {"path": str(out), "model": model})
    forms = ", ".join(f"{count:,} {form}" for form, count in sorted(summary.forms.items()))
    print(f"{out}: {summary.documents:,} documents of {summary.rows:,} rows ({forms})")
    print(f"{summary.tokens:,} tokens in {summary.shards:,} shards")
    if summary.quarantined:
        print(f"{summary.quarantined:,} broken rows: see {out / 'quarantine.jsonl'}")


@app.command(epilog=_examples("earlyfusion info", "earlyfusion info ./my-model --json"))
def info(
    model: Annotated[str, typer.Argument(help="mini, a model folder, or a hub id.")] = "mini",
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Show a model's shape and memory use, and check that its files are complete."""
    from earlyfusion.checkpoints.summary import summarize
    from earlyfusion.terminal import spinner

    with spinner(f"reading {model}", as_json):
        summary = asdict(summarize(model, verify))
    summary["default_cache"] = _default_cache(summary)
    if as_json:
        return _print_json({"model": model} | summary)
    for name, value in summary.items():
        for item, amount in value.items() if isinstance(value, dict) else [("", value)]:
            label = " ".join([*name.split("_"), item]).strip()
            if isinstance(amount, int):
                print(f"{label:<36}{amount:>16,}")
            elif amount is not None:
                print(f"{label:<36}{amount}")


@app.command(
    epilog=_examples(
        "earlyfusion bench",
        "earlyfusion bench ./my-model --dtype int8 --threads 2",
        "earlyfusion bench --shape 1b --json > 1b.json",
    )
)
def bench(
    model: Annotated[
        str | None, typer.Argument(help="mini, a model folder, or a hub id.", show_default="mini")
    ] = None,
    shape: Annotated[
        Shape | None, typer.Option(help="Random weights of this size instead.")
    ] = None,
    threads: Annotated[int | None, whole_option("Processor threads.", unset="torch's own")] = None,
    rounds: Annotated[int, whole_option("Figures are medians of this many rounds.")] = 3,
    device: Device = "auto",
    dtype: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure start-up, memory, tokens and images on this machine, and compare with its limits."""
    from earlyfusion.terminal import spinner

    with spinner("starting", as_json) as set_text:
        start = perf_counter()
        from earlyfusion.bench.speed import bench as measure_speed

        import_seconds = perf_counter() - start
        report = measure_speed(
            model, shape, device, dtype, threads, rounds, import_seconds, set_text
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report.table)


@app.command(
    epilog=_examples(
        "earlyfusion serve",
        "earlyfusion serve --model ./my-model --port 9000",
        "EARLYFUSION_API_KEY=… earlyfusion serve --host 0.0.0.0",
    )
)
def serve(
    model: ModelName = "mini",
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines need an API key.")
    ] = ServeOptions.host,
    port: Annotated[int, whole_option("Port to listen on; 0 takes any free one.")] = (
        ServeOptions.port
    ),
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; may be repeated. An environment variable hides it "
            "from other users of the machine.",
            envvar="EARLYFUSION_API_KEY",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="The model's name for clients; if not given, that of --model.")
    ] = ServeOptions.name,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Ignore unknown fields, and list them in a header.")
    ] = ServeOptions.lenient,
    max_queue: Annotated[int, whole_option("Most requests that wait; others get 429.")] = (
        ServeOptions.max_queue
    ),
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch images from public addresses.")
    ] = ServeOptions.allow_image_urls,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a web page that may call the server; may be repeated."),
    ] = None,
    public_url: Annotated[
        str, typer.Option(help="The server's address for clients, in addresses of images.")
    ] = ServeOptions.public_url,
    image_delivery: Annotated[
        str,
        typer.Option(
            metavar="|".join(DELIVERIES),
            help="How chats get images if the request does not say; with markdown, Open WebUI "
            "shows them between the texts.",
        ),
    ] = ServeOptions.image_delivery,
    file_bytes: Annotated[
        int | None,
        bytes_option(
            "Memory for images that were generated or uploaded; the oldest are dropped first.",
            unset=f"{ServeOptions.file_bytes // 10**6}MB",
        ),
    ] = None,
    step_timeout: Annotated[
        int, whole_option("Seconds after which a step of the engine counts as hung.")
    ] = int(ServeOptions.step_timeout),
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="A LoRA adapter (PEFT's files) that clients choose as the model NAME; may be "
            "repeated. Each takes the memory of the layers once more, and a step that several "
            "share takes the time of one step each.",
        ),
    ] = None,
    replicas: Annotated[
        int,
        whole_option(
            "Number of engines, each with its own weights and cache: on a CPU they share the "
            "cores, else each takes a GPU."
        ),
    ] = 1,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Run the engines on the Ray cluster at RAY_ADDRESS; without an address, on this "
            "machine.",
        ),
    ] = False,
    fit: Fit = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    verify: Verify = True,
    cache_bytes: CacheBytes = None,
) -> None:
    """Serve OpenAI's API, with images in and out: chat, responses, images, completions, files."""
    from earlyfusion.serve import check_installed
    from earlyfusion.serve.options import adapters_of, check_replicas

    check_installed()
    check_replicas(replicas)
    adapters = adapters_of(adapter or (), name or Path(model).name)
    options = ServeOptions(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        name=name,
        lenient=lenient,
        max_queue=max_queue,
        allow_image_urls=allow_image_urls,
        cors_origins=tuple(cors_origin or ()),
        public_url=public_url,
        file_bytes=ServeOptions.file_bytes if file_bytes is None else file_bytes,
        step_timeout=step_timeout,
        image_delivery=image_delivery,
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Under torchrun the processes already share the model: do not load it in others.
        if adapters or replicas != 1 or ray:
            raise SettingError(
                "--adapter, --replicas and --ray are not possible under torchrun: merge the "
                "adapter into the model, and start several servers"
            )
        chameleon = _load(
            model, device, dtype=dtype, fit=fit, verify=verify, cache_bytes=cache_bytes
        )
        from earlyfusion.serve.run import serve as run

        run(chameleon, options)
        return
    from earlyfusion.serve.spawn import LoadPlan

    plans = [
        LoadPlan(model, device, dtype, verify, cache_bytes, fit, adapters, number, replicas)
        for number in range(replicas)
    ]
    _serve_in_processes(plans, options, ray)


def _starter(ray: bool, replicas: int) -> Callable[[LoadPlan], Child]:
    """The function that starts an engine's process."""
    if ray:
        from earlyfusion.serve.on_ray import starter

        return starter(replicas)
    from earlyfusion.serve.spawn import start

    return start


def _serve_in_processes(plans: Sequence[LoadPlan], options: ServeOptions, ray: bool) -> None:
    """Serve a model with an engine in a process of its own for each plan."""
    from earlyfusion.terminal import spinner

    start = _starter(ray, len(plans))
    children: list[Child] = []
    remotes: list[RemoteEngine] = []
    # Until the server sets a handler that finishes running requests first.
    previous_handler = _set_sigterm_handler(_stop)
    try:
        with signals_wait():
            children += [start(plan) for plan in plans]
        with spinner(f"loading {plans[0].name}"):
            # Imported while the children load the model.
            from earlyfusion.serve.process import RemoteEngine
            from earlyfusion.serve.run import serve as run

            for plan, child in zip(plans, children, strict=True):
                remotes.append(RemoteEngine(partial(start, plan), options.step_timeout, child))
        run(remotes[0].info.model, options, remote=remotes if len(remotes) > 1 else remotes[0])
    finally:
        _set_sigterm_handler(previous_handler)
        for remote in remotes:
            remote.close()
        for process, _ in children[len(remotes) :]:
            process.kill()


def _set_sigterm_handler(handler: Any) -> Any:
    """Set the handler of SIGTERM and return the previous one. Only the main thread can: in others
    nothing is done and None is returned."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if is_main_thread else None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM while the model is loaded."""
    print("stopped before the server was ready", file=sys.stderr)
    raise SystemExit(0)


def _load(
    model: str,
    device: str,
    quiet: bool = False,
    dtype: str = "auto",
    fit: bool | None = None,
    verify: bool = True,
    cache_bytes: int | None = None,
) -> Chameleon:
    """Load a model with a spinner; under torchrun, shared by all processes. `fit` overrides the
    model's own resize mode."""
    from earlyfusion.terminal import spinner

    # Under torchrun several processes share one model; only the first prints.
    is_shared = "TORCHELASTIC_RUN_ID" in os.environ
    processes = int(os.environ["WORLD_SIZE"]) if is_shared else 1
    with spinner(f"loading {model}", quiet or (is_shared and os.environ["RANK"] != "0")):
        from earlyfusion.api import Chameleon

        chameleon = Chameleon.load(
            model,
            device=device,
            dtype=dtype,
            tensor_parallel=processes,
            verify=verify,
            cache_bytes=cache_bytes,
        )
        if fit is not None:
            chameleon.image_tokenizer.mode = "fit" if fit else "crop"
        return chameleon


def _default_cache(summary: dict[str, Any]) -> dict[str, int]:
    """The capacity of the engine's cache on this machine, by dtype of keys and values."""
    from earlyfusion.engine.cache import cache_size

    device, context, capacity = resolve_device("auto"), summary["context"], {}
    for dtype, token_bytes in summary["kv_bytes_per_token"].items():
        size = cache_size(token_bytes, context, device, reserved=summary["memory"][dtype])
        capacity[f"bytes {dtype}"] = size.bytes
        capacity[f"tokens {dtype}"] = size.tokens
        capacity[f"requests of 300 tokens {dtype}"] = size.requests(300)
        capacity[f"requests of {context} tokens {dtype}"] = size.requests(context)
    return capacity


def _check_pipe(names: list[str]) -> None:
    if names.count("-") > 1:
        raise SettingError("only one of the prompt and the images can be -: there is one pipe")


def _read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt, from an argument, a file or a pipe. Raises `PromptError`."""
    if argument is not None and file is not None:
        raise PromptError(f"a prompt and --prompt-file {file} are given: leave one out")
    if argument is not None and argument != "-":
        return argument
    if argument is None and file is None:
        raise PromptError(
            "the prompt is missing: give a text, - for a pipe, or --prompt-file; "
            "see 'earlyfusion generate --help'"
        )
    name = str(file) if file else "standard input"
    try:
        with file.open("rb") if file else nullcontext(sys.stdin.buffer) as stream:
            data = stream.read(_MAX_PROMPT_BYTES + 1)
        if len(data) > _MAX_PROMPT_BYTES:
            raise PromptError(f"{name} has over {_MAX_PROMPT_BYTES:,} bytes: give a shorter prompt")
        return data.decode("utf-8-sig").rstrip("\r\n")
    except OSError:
        raise PromptError(f"{name} cannot be read: give a text file with the prompt") from None
    except UnicodeDecodeError:
        raise PromptError(f"{name} is not text in UTF-8: give one with the prompt") from None


def _open_image(name: str) -> Image:
    from earlyfusion.content import MAX_FILE_BYTES, Image

    if name == "-":
        return Image.from_bytes(sys.stdin.buffer.read(MAX_FILE_BYTES + 1), "standard input")
    return Image.open(name)


def _sampling_params(sampling: dict[str, Any]) -> SamplingParams:
    """The settings given by options; a random seed is chosen here, so that it can be printed."""
    seed = sampling.get("seed")
    return SamplingParams(**sampling | {"seed": secrets.randbits(31) if seed is None else seed})


def _print_error(sentence: str) -> int:
    print(f"Error: {shortened(' '.join(sentence.split()))}", file=sys.stderr)
    return 2


def _print_usage_error(error: typer.TyperException) -> int:
    """Print Typer's message as one sentence; it is empty if Typer has shown the help instead."""
    command = getattr(getattr(error, "ctx", None), "command_path", "earlyfusion")
    message = error.format_message().rstrip(".?").replace(". ", "; ")
    message = message.replace("Value error, ", "")  # which pydantic puts before what Typer says
    return _print_error(f"{message}; see '{command} --help'") if message else 2


def _print_json(data: dict[str, Any]) -> None:
    # A stream in memory has no encoding.
    encoding = (sys.stdout.encoding or "ascii").lower()
    print(json.dumps(data, ensure_ascii=encoding not in ("utf-8", "utf8")))
