"""llama.cpp beside the engine at equal bits, text only: a table in Markdown, and JSON for plots.py.

    python -m venv bench && bench/bin/pip install llama-cpp-python gguf
    python benchmarks/llama.py --python bench/bin/python --shape 1b --threads 2 --rounds 3

Each contender is a process of its own that keeps its model and waits while another one measures;
they take turns in every round, and figures are medians. llama.cpp runs its own "chameleon" graph,
norms of queries and keys included, on random weights of the same shape in bf16, Q8_0 and Q4_0, head
and embedding too, with and without its flash attention. It computes the whole vocabulary;
earlyfusion's head leaves image and control tokens out where text is asked for. The graph wants more
than 8,196 ids: 110m and 1b. Building llama-cpp-python takes minutes, CMake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = ("110m", "1b")
BITS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
CONTEXTS = (2, 1058)
TOKENS = 24


# ---- the processes that measure; those of llama.cpp have neither torch nor earlyfusion


class Llama:
    """A GGUF file under llama.cpp."""

    def __init__(self, file: str, threads: int, flash: bool) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        self._quiet = quiet
        given = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), given)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 1280
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = int(flash)
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot open {file}")

    def measure(self, context: int) -> tuple[float, float]:
        """Seconds of a prompt of this many tokens, and of a token after it."""
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_clear(memory, True)
        first = self._seconds(list(range(9000, 9000 + context)))
        rest = [self._seconds([9000 + number]) for number in range(TOKENS)]
        return first, sum(rest) / TOKENS

    def _seconds(self, tokens: list[int]) -> float:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        start = time.perf_counter()
        if self._api.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp cannot run this graph")
        self._api.llama_get_logits_ith(self._context, -1)  # waits for them
        return time.perf_counter() - start


class Ours:
    """A model folder under the engine."""

    def __init__(self, folder: str, threads: int, dtype: str) -> None:
        import torch

        from earlyfusion import Chameleon
        from earlyfusion.bench.speed import Meter

        torch.set_num_threads(threads)
        self._meter = Meter(Chameleon.load(folder, device="cpu", dtype=dtype), 1)

    def measure(self, context: int) -> tuple[float, float]:
        return self._meter.reply(context)


def work(contender: str, file: str, threads: int) -> None:
    """Answer each line of standard input, a context, with two numbers."""
    name, _, how = contender.partition(":")
    model = Ours(file, threads, how) if name == "ours" else Llama(file, threads, how == "flash")
    for line in sys.stdin:
        print(json.dumps(model.measure(int(line))), flush=True)


def write_gguf(file: str, bits: str, shape: dict[str, Any], tokenizer: str | None) -> None:
    """A file of random weights; matrices of one size are the same, which does not change speed.
    `tokenizer` is a tokenizer.json, which servers need."""
    import gguf
    import numpy as np

    D, F, N, H = (shape[k] for k in ("width", "inner", "heads", "head_width"))
    dtype = gguf.GGMLQuantizationType[bits]
    source, made = np.random.default_rng(0), {}

    def matrix(rows: int, columns: int) -> Any:
        if (rows, columns) not in made:
            values = source.standard_normal((rows, columns), dtype=np.float32) * 0.02
            made[rows, columns] = gguf.quants.quantize(values, dtype)
        return made[rows, columns]

    writer = gguf.GGUFWriter(file, "chameleon")
    writer.add_context_length(4096)
    writer.add_embedding_length(D)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(N)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["words"])
    writer.add_rope_dimension_count(H)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, Path(tokenizer), shape["words"])
    writer.add_bool("chameleon.swin_norm", False)
    head_norm = np.ones((N, H), np.float32)
    tensors: dict[str, Any] = {
        "token_embd.weight": matrix(shape["words"], D),
        "output.weight": matrix(shape["words"], D),
        "output_norm.weight": np.ones(D, np.float32),
    }
    for layer in range(shape["layers"]):
        here = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{here}{name}.weight"] = matrix(D, D)
        for name, size in (("ffn_gate", (F, D)), ("ffn_up", (F, D)), ("ffn_down", (D, F))):
            tensors[f"{here}{name}.weight"] = matrix(*size)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"{here}{name}.weight"] = np.ones(D, np.float32)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[f"{here}{name}.weight"] = head_norm
            tensors[f"{here}{name}.bias"] = 0 * head_norm
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=dtype if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, file: Path, words: int) -> None:
    """The byte-level BPE of a tokenizer.json. Control tokens and codes are no text."""
    import gguf

    known = json.loads(file.read_text("utf-8"))
    plain, added = known["model"]["vocab"], {t["content"]: t["id"] for t in known["added_tokens"]}
    names = {i: f"<unused {i}>" for i in range(words)} | {i: n for n, i in plain.items()}
    names |= {i: n for n, i in added.items()}
    text, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    special = {i for n, i in plain.items() if n.startswith(("IMGIMG", "<"))} | set(added.values())
    merges = [m if isinstance(m, str) else " ".join(m) for m in known["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("chameleon")
    writer.add_token_list([names[i] for i in range(words)])
    writer.add_token_types([control if i in special else text for i in range(words)])
    writer.add_token_merges(merges)
    for name, add in (("<s>", writer.add_bos_token_id), ("</s>", writer.add_eos_token_id)):
        add((plain | added)[name])


# ---- the process that asks them


class Contender:
    def __init__(self, python: str, contender: str, file: str, threads: int) -> None:
        command = [python, __file__, "--work", contender, "--file", file, "--threads", str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def measure(self, context: int) -> tuple[float, float]:
        assert self._process.stdin and self._process.stdout
        print(context, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contender has ended: see its message above")
        first, token = json.loads(line)
        return first, token

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def sizes_of(config: Any) -> dict[str, int]:
    """The sizes of a ModelConfig, as `--sizes` takes them."""
    return {
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.num_attention_heads,
        "head_width": config.head_dim,
        "layers": config.num_hidden_layers,
        "words": config.vocab_size,
    }


def compare(options: argparse.Namespace, folder: Path) -> None:
    from earlyfusion.bench.harness import OURS, Row, medians, save, table, take_turns
    from earlyfusion.bench.shapes import write_random

    config = write_random(options.shape, folder / "model")
    shape = sizes_of(config)
    rows = []
    for dtype in options.dtypes:
        bits, file = BITS[dtype], str(folder / f"{dtype}.gguf")
        made = [options.python, __file__, "--write", bits, "--file", file]
        subprocess.run([*made, "--sizes", json.dumps(shape)], check=True)
        ways = {
            OURS: (sys.executable, f"ours:{dtype}", str(folder / "model")),
            f"llama.cpp {bits}": (options.python, "llama:plain", file),
            f"llama.cpp {bits}, flash": (options.python, "llama:flash", file),
        }
        contenders = {name: Contender(*how, options.threads) for name, how in ways.items()}
        for context in CONTEXTS:
            turns = {name: partial(c.measure, context) for name, c in contenders.items()}
            times = take_turns(turns, options.rounds)
            firsts = medians({n: [first for first, _ in t] for n, t in times.items()}, 1e3)
            tokens = medians({n: [token for _, token in t] for n, t in times.items()}, 1e3)
            rows.append(Row(f"a token, {dtype}, context {context:,}", "ms", tokens))
            if context > 100:
                rows.append(Row(f"a prompt of {context:,}, {dtype}", "ms", firsts))
        for contender in contenders.values():
            contender.close()
        Path(file).unlink()
    print(f"{options.shape}, {options.threads} threads\n\n{table(rows)}")
    save(rows, options.json, shape=options.shape, threads=options.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="where llama-cpp-python is")
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--dtypes", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for name in ("--work", "--write", "--file", "--sizes", "--tokenizer"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.file, options.threads)
    elif options.write:
        sizes = json.loads(options.sizes)
        write_gguf(options.file, options.write, sizes, options.tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))


if __name__ == "__main__":
    main()
