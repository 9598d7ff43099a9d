"""The command line: each command turns its options into calls of the public API.

Only Typer is imported here. torch, Rich and the model are imported inside the commands, once the
options are known to be good, so that `--help`, completion and a mistake answer at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from earlyfusion import __version__
from earlyfusion.devices import resolve_device
from earlyfusion.errors import EarlyFusionError, PromptError, SettingError
from earlyfusion.generation.settings import Output

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon
    from earlyfusion.content import Image, Prompt

Mode = Literal["crop", "fit"]
Layout = Literal["hf", "meta"]
Pairs = Literal["turns", "document"]
Dtype = Literal["float32", "bfloat16", "float16"]
Shape = Literal["tiny", "mini", "110m", "1b", "7b"]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


def _number_option(help: str) -> Any:
    # Typer's own numbers leave the wrong value out of the message.
    return typer.Option(parser=_number, metavar="NUMBER", help=help)


def _whole_option(help: str) -> Any:
    return typer.Option(parser=_whole, metavar="WHOLE", help=help)


def _words_option(help: str) -> Any:
    return Annotated[list[str] | None, typer.Option(help=help)]


_DEVICES = ("auto", "cpu", "cuda", "cuda:0", "cuda:1")
_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")


def _begin(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _complete_models(incomplete: str) -> list[str]:
    """mini, and the folders that a path may go on with."""
    start = Path(incomplete if incomplete.endswith("/") else os.path.dirname(incomplete))
    try:
        folders = [f"{path}/" for path in sorted(start.expanduser().iterdir()) if path.is_dir()]
    except OSError:
        folders = []
    return _begin(incomplete, ["mini", *folders])


def _complete_devices(incomplete: str) -> list[str]:
    return _begin(incomplete, _DEVICES)


def _complete_dtypes(incomplete: str) -> list[str]:
    return _begin(incomplete, _DTYPES)


def _complete_recipes(incomplete: str) -> list[str]:
    from earlyfusion.recipes.run import RECIPES

    files = [str(path) for path in sorted(Path().glob("*.py"))]
    return _begin(incomplete, [*RECIPES, *files])


def _complete_fields(ctx: typer.Context, incomplete: str) -> list[str]:
    """Fields of the recipe that was named; after = the values that one can have."""
    from earlyfusion.recipes.run import fields_of

    known, before = fields_of(ctx.params["recipe"]), ctx.params.get("fields") or []
    # bash takes words apart at =, other shells do not; an = alone comes as nothing.
    if not incomplete and before[-1:] and before[-1] in known:
        return list(_values_of(before[-1], known))
    if before[-1:] == ["="]:
        return _begin(incomplete, _values_of(before[-2] if before[1:] else "", known))
    field, found, _ = incomplete.partition("=")
    if not found:
        return _begin(incomplete, [f"{name}=" for name in known])
    return _begin(incomplete, [f"{field}={value}" for value in _values_of(field, known)])


def _values_of(field: str, known: dict[str, tuple[str, Any, str]]) -> Iterable[str]:
    if known.get(field, ("",))[0] == "bool":
        return "true", "false"
    last = field.rpartition(".")[2]
    fixed = {"device": _DEVICES, "precision": ("fp32", "bf16"), "model": ("mini",)}
    return fixed.get(last, ())


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
    typer.Option("--dtype", help=", ".join(_DTYPES), autocompletion=_complete_dtypes),
]
Fit = Annotated[
    bool | None,
    typer.Option(
        "--fit/--crop",
        help="Fit pictures in with a border, or crop the centre; as the model says.",
        show_default=False,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Compare its files with their checklist; info and convert look for NaN too.",
    ),
]
Seed = Annotated[int | None, _whole_option("The same seed gives the same bytes.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Pictures = Annotated[Path, typer.Option("--out", "-o", help="Folder of the drawn PNG files.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]
Temperature = Annotated[float | None, _number_option("0 takes the likeliest token.")]
TopP = Annotated[float | None, _number_option("Share of probability that is kept; 1 is off.")]
TopK = Annotated[int | None, _whole_option("How many tokens are kept; 0 is off.")]
Guidance = Annotated[float | None, _number_option("Pull of the prompt on a drawing; 1 is off.")]

# Options of every command that generates, by the names of SamplingParams' fields.
_SAMPLING: dict[str, Any] = {
    "temperature": Temperature,
    "top_p": TopP,
    "top_k": TopK,
    "min_p": Annotated[
        float | None, _number_option("Least share of the likeliest token; 0 is off.")
    ],
    "repetition_penalty": Annotated[float | None, _number_option("Against repetition; 1 is off.")],
    "image_temperature": Temperature,
    "image_top_p": TopP,
    "image_top_k": TopK,
    "guidance_text": Guidance,
    "guidance_image": Guidance,
    "jacobi": Annotated[
        int | None, _whole_option("Codes of a drawing that are read at once; 0 is off.")
    ],
    "max_tokens": Annotated[int | None, _whole_option("Most new tokens, of text and of images.")],
    "max_images": Annotated[int | None, _whole_option("Most images in the reply.")],
    "stop": _words_option("Ends the reply; may be repeated."),
    "bad_words": _words_option("A word that does not come; may be repeated."),
    "allowed_words": _words_option("Text is made of such words alone; may be repeated."),
    "seed": Seed,
}


def _with_sampling(command: Callable[..., object]) -> Callable[..., object]:
    """A command with the options of _SAMPLING, which it gets as one dict `sampling`."""
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _SAMPLING.items()
    ]
    rest = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for option in own.parameters.values()
        if option.name != "sampling"
    ]

    @functools.wraps(command)
    def call(**given: Any) -> object:
        # An option that may be repeated is an empty list where it is not given.
        sampling = {name: None if (x := given.pop(name)) == [] else x for name in _SAMPLING}
        return command(sampling=sampling, **given)

    parameters = [*rest, *options]
    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in parameters}
    return call


_INTERRUPTED = 130
_READER_GONE = 141  # what a shell shows for SIGPIPE
_MOST_PROMPT_BYTES = 10_000_000
_DEMO_PICTURE = Path(__file__).parent / "pretrained" / "mini" / "examples" / "strawberry.png"
_DEMO_QUESTION = "What is this?"
_DEMO_QUESTION_KO = "이게 뭐야?"
_DEMO_DRAWING = "Draw a red apple."
_DEMO_LIST = "Show me three different fruits. Write each name before its picture."


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
    """Run one command; its exit code: 0, 2 for a user's mistake, 130 where the user stopped it, 141
    where who reads the output has gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(arguments, prog_name="earlyfusion", standalone_mode=False)
        sys.stdout.flush()
    except EarlyFusionError as error:
        return _mistake(str(error))
    except typer.TyperException as error:
        return _misuse(error)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except (BrokenPipeError, SystemExit) as end:
        # Typer makes the second of the first, and of the end of a completion.
        if isinstance(end, SystemExit) and end.code != 1:
            return int(end.code or 0)
        # The reader has gone; what is still buffered has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    return code if isinstance(code, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
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
@_with_sampling
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text; <image> marks the place of each --image; - reads a pipe."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file with the prompt.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture, or - for a pipe; may be repeated.")
    ] = None,
    output: Annotated[Output, typer.Option(help="What the reply may hold.")] = "auto",
    out: Pictures = Path("out"),
    sampling: Any = None,
    fit: Fit = None,
    model: ModelName = "mini",
    device: Device = "auto",
    dtype: Precision = "auto",
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt: text goes to the terminal, pictures to new PNG files.

    Of a picture that is not square the model sees the square in its middle, unless it fits it in.
    """
    from earlyfusion.content import as_messages, fill_placeholders
    from earlyfusion.generation.settings import SamplingParams
    from earlyfusion.terminal import Album, Screen, answer, reply_json

    images = image or []
    _check_pipe([prompt or "", *images])
    words = _prompt(prompt, prompt_file)
    asked = as_messages(fill_placeholders(words, [_picture(name) for name in images]))
    settings = SamplingParams(**sampling | {"seed": _seed(sampling["seed"])})
    album = Album(out)
    if output != "text":
        album.check()
    chameleon, screen = _load(model, device, as_json, dtype, fit, verify), Screen(as_json)
    reply = answer(chameleon, asked, output, settings, album, screen)
    if as_json:
        used = asdict(settings.resolved(chameleon.defaults))
        told = {"seed": used.pop("seed"), "model": model, "output": output, "settings": used}
        _print_json(reply_json(reply, album.path_of) | told)


@app.command(
    epilog=_examples(
        "earlyfusion chat",
        "earlyfusion chat --resume conversation",
        "echo Hello | earlyfusion chat --output text",
    )
)
@_with_sampling
def chat(
    resume: Annotated[
        Path | None, typer.Option(help="A folder that /save wrote.", show_default=False)
    ] = None,
    output: Annotated[Output, typer.Option(help="What a reply may hold.")] = "auto",
    out: Pictures = Path("out"),
    sampling: Any = None,
    fit: Fit = None,
    model: ModelName = "mini",
    device: Device = "auto",
    dtype: Precision = "auto",
    verify: Verify = True,
) -> int:
    """Talk with the model; it remembers. Commands: /image /undo /reset /save /load /quit."""
    from earlyfusion.chat import Conversation
    from earlyfusion.generation.settings import SamplingParams
    from earlyfusion.terminal import Album

    settings = SamplingParams(**sampling | {"seed": _seed(sampling["seed"])})
    album = Album(out)
    if output != "text":
        album.check()
    chameleon = _load(model, device, dtype=dtype, fit=fit, verify=verify)
    conversation = Conversation(chameleon, output, settings, album)
    if resume is not None:
        conversation.resume(resume)
    return conversation.run()


@app.command(
    epilog=_examples(
        "earlyfusion batch requests.jsonl -o replies",
        "earlyfusion batch requests.jsonl -o replies --output text --temperature 0 --json",
    )
)
@_with_sampling
def batch(
    requests: Annotated[
        Path, typer.Argument(help='JSON lines, as {"prompt": "Draw a cat.", "output": "image"}.')
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the replies.")],
    output: Annotated[Output, typer.Option(help="For lines that do not say.")] = "auto",
    sampling: Any = None,
    model: ModelName = "mini",
    device: Device = "auto",
    dtype: Precision = "auto",
    fit: Fit = None,
    verify: Verify = True,
    as_json: AsJson = False,
) -> int:
    """Answer many prompts at once; again, to go on. The options are for lines that do not say.

    A line has a prompt (a text, a list of parts, or a list of messages), and if wanted id, images,
    output, seed and other sampling fields. Paths of pictures are seen from the folder of the file.
    """
    from earlyfusion.batch import Replies, answer_all, read_jobs
    from earlyfusion.content import counted
    from earlyfusion.terminal import progress_bar

    jobs = read_jobs(requests, output, sampling, model)
    with Replies(out) as replies:
        left = replies.left(jobs)
        try:
            chameleon = _load(model, device, as_json, dtype, fit, verify)
            with progress_bar(as_json) as bar:
                task = bar.add_task("answering", total=len(jobs), completed=len(jobs) - len(left))
                answer_all(chameleon, left, replies, lambda: bar.advance(task))
        except KeyboardInterrupt:
            print("Stopped: the same command goes on where it was.", file=sys.stderr)
            raise
    failed = replies.errors
    if as_json:
        told = {"replies": len(jobs) - failed, "new": len(left) - failed, "errors": failed}
        _print_json({"path": str(out)} | told)
    else:
        print(f"{out / 'replies.jsonl'}: {counted(len(left) - failed, 'new reply', 'new replies')}")
    if failed:
        told_of = f"{counted(failed, 'request')} of {len(jobs):,} failed"
        print(f"Error: {told_of}: see {out / 'errors.jsonl'}", file=sys.stderr)
    return 2 if failed else 0


@app.command(epilog=_examples("earlyfusion demo", "earlyfusion demo --out pictures --seed 3"))
def demo(
    out: Pictures = Path("earlyfusion-demo"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """A short tour with the embedded model: a picture is named, one is drawn, both are mixed."""
    from earlyfusion.content import Image, fill_placeholders
    from earlyfusion.generation.settings import SamplingParams
    from earlyfusion.terminal import Album, Screen, answer, reply_json

    album = Album(out)
    album.check()
    picture, sampling = Image.open(_DEMO_PICTURE), SamplingParams(seed=_seed(seed))
    chameleon, screen = _load("mini", device, as_json), Screen(as_json)
    tour: list[tuple[str, Prompt, Output]] = [
        (_DEMO_QUESTION, fill_placeholders(_DEMO_QUESTION, [picture]), "text"),
        (_DEMO_QUESTION_KO, fill_placeholders(_DEMO_QUESTION_KO, [picture]), "text"),
        (_DEMO_DRAWING, _DEMO_DRAWING, "image"),
        (_DEMO_LIST, _DEMO_LIST, "interleaved"),
    ]
    steps = []
    screen.picture(picture)
    for words, prompt, output in tour:
        screen.line(f"\n> {words}")
        reply = answer(chameleon, prompt, output, sampling, album, screen)
        steps.append({"prompt": words} | reply_json(reply, album.path_of))
    screen.line(f"\nThe pictures are in {out}. Next: earlyfusion chat")
    if as_json:
        _print_json({"steps": steps, "seed": sampling.seed, "out": str(out)})


@app.command(
    epilog=_examples(
        "earlyfusion encode a.png b.png -o codes.safetensors",
        "earlyfusion encode wide.png -o wide.safetensors --fit --json",
    )
)
def encode(
    images: Annotated[list[str], typer.Argument(help="Pictures.", metavar="IMG")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors or .npy file.")],
    fit: Fit = None,
    mode: Annotated[Mode | None, typer.Option(help="The same by name.", hidden=True)] = None,
    model: ModelName = "mini",
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn pictures into image codes: one tensor "codes" of n x h x w whole numbers."""
    from earlyfusion.checkpoints.codes import check_name, save_codes
    from earlyfusion.files import check_writable, taken

    if mode is not None and fit not in (None, mode == "fit"):
        raise SettingError(f"--mode {mode} and --{'fit' if fit else 'crop'} differ: give one")
    check_name(out)
    if os.path.lexists(out) and not overwrite:
        raise taken(out)
    _check_pipe(images)
    pictures = [_picture(name) for name in images]
    check_writable(out.parent)
    codes = _load(model, device, as_json, fit=fit).image_tokenizer.encode(pictures, mode)
    save_codes(out, codes.cpu().numpy(), overwrite)
    if as_json:
        _print_json({"path": str(out), "shape": list(codes.shape), "images": images})
    else:
        print(f"{out}: {' x '.join(map(str, codes.shape))} codes")


@app.command(epilog=_examples("earlyfusion decode codes.safetensors -o pictures"))
def decode(
    codes: Annotated[Path, typer.Argument(help="A file that `earlyfusion encode` wrote.")],
    out: Pictures = Path("out"),
    model: ModelName = "mini",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw the pictures that image codes stand for."""
    from earlyfusion.checkpoints.codes import load_codes
    from earlyfusion.terminal import Album, Screen, decoded

    album, codes_nhw = Album(out), load_codes(codes)
    album.check()
    chameleon, screen = _load(model, device, as_json), Screen(as_json)
    images = decoded(chameleon, *codes_nhw)
    paths = [album.save(image) for image in images]
    for image, path in zip(images, paths, strict=True):
        screen.picture(image, path)
    if as_json:
        _print_json({"images": [str(path) for path in paths]})


@app.command(
    epilog=_examples(
        "earlyfusion convert models/7b chameleon-7b --to hf --tokenizer tokenizer",
        "earlyfusion convert chameleon-7b models/7b --to meta --shards 2",
        "earlyfusion convert lumina lumina-whole --to hf --tokenizer t --image-tokenizer t",
    )
)
def convert(
    source: Annotated[str, typer.Argument(help="mini, a model folder, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[Layout, typer.Option(help="transformers' layout, or Meta's.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, where it is not with the model.")
    ] = None,
    shards: Annotated[
        int | None, _whole_option("Files of weights; hf: each under 5 GB, meta: as they came.")
    ] = None,
    image_tokenizer: Annotated[
        Path | None, typer.Option(help="VQ-GAN to add: a tokenizer folder, vqgan.ckpt or a model.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the transformer; as it is.")] = None,
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Write a model in another layout, in another number of files, or with a VQ-GAN added."""
    from earlyfusion.terminal import busy, progress_bar

    with busy(f"opening {source}", as_json):
        import torch

        from earlyfusion.checkpoints.convert import convert as write

    with progress_bar(as_json) as bar:
        task = bar.add_task("converting")
        write(
            source,
            target,
            to,
            tokenizer=tokenizer,
            image_tokenizer=image_tokenizer,
            shards=shards,
            dtype=getattr(torch, dtype) if dtype else None,
            verify=verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in sorted(target.rglob("*.*"))}
    if as_json:
        return _print_json({"path": str(target), "layout": to, "file_bytes": sizes})
    for name, size in sizes.items():
        print(f"{name:<36}{size:>16,}")


class _Train(TyperCommand):
    """Its help lists the recipes, or with a recipe that recipe's fields."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if {"-h", "--help"} & set(args) and not ctx.resilient_parsing:
            from earlyfusion.recipes.run import RECIPES, described, summary

            named = [arg for arg in args if not arg.startswith("-") and "=" not in arg]
            if named:
                print(described(named[0]))
                ctx.exit()
            listed = [f"{name}: {summary(name)}" for name in RECIPES]
            fields = "earlyfusion train RECIPE --help lists what can be changed in one."
            self.epilog = "\n\n".join([self.epilog or "", "Recipes:", *listed, fields])
        return super().parse_args(ctx, args)


@app.command(
    cls=_Train,
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
            metavar="FIELD=VALUE", help="What to change in it.", autocompletion=_complete_fields
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Only tell its memory, speed and days on many GPUs.")
    ] = False,
) -> None:
    """Run a training recipe; run it again to go on where it stopped."""
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
def tokenize(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, globs or hub ids.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the token shards.")],
    workers: Annotated[int | None, _whole_option("Processes, or actors with --ray; 1.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Over the cluster of RAY_ADDRESS.")] = False,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Files to take, as 'train/*.tar'; may be repeated.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures that rows name.")
    ] = None,
    resize_mode: Annotated[
        Mode | None, typer.Option(help="How a prompt's become square; as the model has it.")
    ] = None,
    prompt_images: Annotated[
        Mode | None, typer.Option(help="An older name of --resize-mode.", hidden=True)
    ] = None,
    answer_images: Annotated[Mode, typer.Option(help="How an answer's become square.")] = "crop",
    pairs: Annotated[Pairs, typer.Option(help="Prompt and answer, or one document.")] = "turns",
    image_first: Annotated[float | None, _number_option("Share of pairs; 0.5.")] = None,
    max_broken: Annotated[float | None, _number_option("Most rows to refuse; 0.1 of all.")] = None,
    shard_rows: Annotated[int | None, _whole_option("Rows a shard; 2048.")] = None,
    seed: Seed = 0,
    model: ModelName = "mini",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Turn a corpus of text and pictures into tokens for training; again, to go on."""
    from earlyfusion.files import check_writable
    from earlyfusion.terminal import busy, progress_bar

    check_writable(out)
    with busy(f"opening {' '.join(sources)}", as_json):
        from earlyfusion.checkpoints.detect import locate
        from earlyfusion.data.encoding import EncodingSettings
        from earlyfusion.data.rows import RowSettings
        from earlyfusion.data.shard_maker import Job
        from earlyfusion.data.tokenize import tokenize as write

        first = 0.5 if image_first is None else image_first
        broken = 0.1 if max_broken is None else max_broken
        job = Job(
            sources=tuple(sources),
            out=out,
            model=locate(model),
            device=str(resolve_device(device)),
            rows_a_shard=2048 if shard_rows is None else shard_rows,
            rows=RowSettings(tuple(pattern or ()), images, broken),
            encoding=EncodingSettings(
                prompt_images or "", answer_images, pairs, first, seed or 0, resize_mode or ""
            ),
        )
    with progress_bar(as_json) as bar:
        task = bar.add_task("tokenizing")
        made = write(
            job,
            1 if workers is None else workers,
            ray,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        return _print_json(asdict(made) | {"path": str(out), "model": model})
    forms = ", ".join(f"{count:,} {form}" for form, count in sorted(made.forms.items()))
    print(f"{out}: {made.documents:,} documents of {made.rows:,} rows ({forms})")
    print(f"{made.tokens:,} tokens in {made.shards:,} shards")
    if made.quarantined:
        print(f"{made.quarantined:,} broken rows: see {out / 'quarantine.jsonl'}")


@app.command(epilog=_examples("earlyfusion info", "earlyfusion info ./my-model --json"))
def info(
    model: Annotated[str, typer.Argument(help="mini, a model folder, or a hub id.")] = "mini",
    verify: Verify = True,
    as_json: AsJson = False,
) -> None:
    """Show what a model is and what running it takes; checks that its files are whole."""
    from earlyfusion.checkpoints.summary import summarize
    from earlyfusion.terminal import busy

    with busy(f"reading {model}", as_json):
        summary = asdict(summarize(model, verify))
    if as_json:
        return _print_json({"model": model} | summary)
    for name, value in summary.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for what, amount in rows:
            if amount is None:
                continue
            label = " ".join([*name.split("_"), what]).strip()
            print(
                f"{label:<36}{amount:>16,}" if isinstance(amount, int) else f"{label:<36}{amount}"
            )


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
    shape: Annotated[Shape | None, typer.Option(help="Random weights of this size.")] = None,
    threads: Annotated[int | None, _whole_option("Of the processor; as torch has it.")] = None,
    rounds: Annotated[int | None, _whole_option("Figures are medians of so many; 3.")] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure on this machine: start, memory, tokens, pictures, and their share of its limits."""
    from earlyfusion.terminal import busy

    with busy("starting", as_json) as say:
        since = perf_counter()
        from earlyfusion.bench.speed import bench as measure

        imports, rounds = perf_counter() - since, 3 if rounds is None else rounds
        report = measure(model, shape, device, dtype, threads, rounds, imports, say)
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
    host: Annotated[str, typer.Option(help="Others than this machine need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, _whole_option("0 takes any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Clients must send it; may be repeated. The environment does not show it to "
            "others on the machine.",
            envvar="EARLYFUSION_API_KEY",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="The model's name for clients [as --model].")] = "",
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Ignore unknown fields, and list them in a header.")
    ] = False,
    max_queue: Annotated[int, _whole_option("Most requests that wait; more get 429.")] = 256,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch pictures from public addresses.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page that may ask; may be repeated.")
    ] = None,
    public_url: Annotated[
        str, typer.Option(help="Where clients reach the server, for addresses of pictures.")
    ] = "",
    fit: Fit = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    verify: Verify = True,
) -> None:
    """Serve OpenAI's API, with pictures in and out: chat, responses, images, completions, files."""
    from earlyfusion.serve import check_installed
    from earlyfusion.serve.options import ServeOptions

    check_installed()
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
    )
    chameleon = _load(model, device, dtype=dtype, fit=fit, verify=verify)
    from earlyfusion.serve.run import serve as run

    run(chameleon, options)


def _load(
    name: str,
    device: str,
    quiet: bool = False,
    dtype: str = "auto",
    fit: bool | None = None,
    verify: bool = True,
) -> Chameleon:
    from earlyfusion.terminal import busy

    # Started by torchrun, all processes share the model; the first speaks.
    shared = "TORCHELASTIC_RUN_ID" in os.environ
    processes = int(os.environ["WORLD_SIZE"]) if shared else 1
    with busy(f"loading {name}", quiet or (shared and os.environ["RANK"] != "0")):
        from earlyfusion.api import Chameleon

        model = Chameleon.load(
            name, device=device, dtype=dtype, tensor_parallel=processes, verify=verify
        )
        if fit is not None:
            model.image_tokenizer.mode = "fit" if fit else "crop"
        return model


def _check_pipe(names: list[str]) -> None:
    if names.count("-") > 1:
        raise SettingError("only one of the prompt and the pictures can be -: there is one pipe")


def _prompt(words: str | None, file: Path | None) -> str:
    """The prompt as it was given: as an argument, in a file or in a pipe."""
    if words is not None and file is not None:
        raise PromptError(f"a prompt and --prompt-file {file} are given: leave one out")
    if words is not None and words != "-":
        return words
    if words is None and file is None:
        raise PromptError(
            "the prompt is missing: give a text, - for a pipe, or --prompt-file; "
            "see 'earlyfusion generate --help'"
        )
    name = str(file) if file else "standard input"
    try:
        with file.open("rb") if file else nullcontext(sys.stdin.buffer) as stream:
            data = stream.read(_MOST_PROMPT_BYTES + 1)
        if len(data) > _MOST_PROMPT_BYTES:
            raise PromptError(
                f"{name} has over {_MOST_PROMPT_BYTES:,} bytes: give a shorter prompt"
            )
        return data.decode("utf-8-sig").rstrip("\r\n")
    except OSError:
        raise PromptError(f"{name} cannot be read: give a text file with the prompt") from None
    except UnicodeDecodeError:
        raise PromptError(f"{name} is no text in UTF-8: give one with the prompt") from None


def _picture(name: str) -> Image:
    from earlyfusion.content import MAX_FILE_BYTES, Image

    if name == "-":
        return Image.from_bytes(sys.stdin.buffer.read(MAX_FILE_BYTES + 1), "standard input")
    return Image.open(name)


def _seed(seed: int | None) -> int:
    """The seed asked for, or a fresh one that can be told to the user."""
    return secrets.randbits(31) if seed is None else seed


def _mistake(sentence: str) -> int:
    print(f"Error: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _misuse(error: typer.TyperException) -> int:
    """Typer's words as one sentence; it has none where it has shown the help instead."""
    command = getattr(getattr(error, "ctx", None), "command_path", "earlyfusion")
    said = error.format_message().rstrip(".?").replace(". ", "; ")
    return _mistake(f"{said}; see '{command} --help'") if said else 2


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
