"""The transformers layout: config.json, safetensors, tokenizer.json; the only owner of safetensors.

The transformer's names are its own; the VQ-GAN's stand under `model.vqmodel.`, with the decoder
that transformers leaves out. Its weights stay fp32 in memory: in bf16 some codes would change.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from earlyfusion.checkpoints import anole, lumina
from earlyfusion.checkpoints.source import (
    MappedFile,
    Source,
    Step,
    Stored,
    check_names,
    new_folder,
    torch_load,
)
from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.image_tokenizer import Mode
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import packed_bits, quantise
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN, Quantizer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    END_OF_TURN,
    EOS,
    IMAGE_PLACEHOLDERS,
    IMAGE_PREFIX,
    PAD,
    UNK,
    ImageLayout,
    Vocabulary,
    read_tokenizer_json,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.json"
PROCESSOR = "processor_config.json"
PACKED = "earlyfusion"  # quant_method of weights that this package packs
VQ_PREFIX = "model.vqmodel."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MAX_FILE = 5_000_000_000
# A model's card, and what its licence asks copies to keep.
# The card of a model, and what its licence asks copies to keep.
PAPERS = ("README.md", "NOTICE*", "LICEN[CS]E*", "COPYING*", "USE_POLICY*")
# dtype names of the safetensors format.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass
class Loaded:
    """A whole model read from a folder, on its device, in eval mode."""

    config: ModelConfig
    transformer: Transformer
    vqgan: VQGAN
    processor: Processor
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    resize_mode: Mode = "crop"

    @property
    def can_decode(self) -> bool:
        """Whether codes can become pictures; transformers' own files hold no decoder."""
        return self.vqgan.decoder is not None


class MissingVQGAN(VQGAN):
    """Stands where a checkpoint has no VQ-GAN: text works, and a picture says what to do."""

    def __init__(self, config: VQConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.decoder = config, None
        self.quantize = Quantizer(VQConfig(embed_dim=1, num_embeddings=1))

    def latents(self, pixels_BCYX: Tensor) -> Tensor:
        raise CheckpointError(_NO_VQGAN)

    def decode(self, codes_Byx: Tensor) -> Tensor:
        raise CheckpointError(_NO_VQGAN)


_NO_VQGAN = (
    "this checkpoint has no image tokenizer, so pictures can be neither read nor drawn: "
    "add one with earlyfusion convert --image-tokenizer"
)


def load_hf(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """Read a folder in transformers' layout; `dtype` None keeps that of the file.

    Raises `CheckpointError` for missing or damaged files and for keys that are not as expected.
    """
    return assemble(open_hf(folder), device, dtype)


def open_hf(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a folder in transformers' layout, as it is today or as early versions wrote it.

    `tokenizer` is a tokenizer file, or a folder with one, to take in place of the folder's own.
    """
    data = read_json(folder / "config.json")
    config = ModelConfig.from_dict(data)
    config.check()
    tensors = open_tensors(folder)
    vq = {k.removeprefix(VQ_PREFIX): tensors.pop(k) for k in list(tensors) if _is_vq(k)}
    # Written by old versions of transformers; computed here.
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if anole.is_early(tensors):
        tensors = _modern(tensors, config, folder)
    grid, spelled = config.vq_config.grid, lumina.is_lumina(data)
    generation = read_json(folder / "generation_config.json", needed=False)
    return Source(
        folder=folder,
        config=config,
        tensors={name: _per_head(name, s, config) for name, s in tensors.items()},
        vq=vq,
        tokenizer=find_tokenizer_file(tokenizer or folder),
        layout=lumina.layout(grid) if spelled else ImageLayout(grid, grid),
        generation_defaults=({"chameleon": lumina.SAMPLING} if spelled else {}) | generation,
        kind=lumina.KIND if spelled else "chameleon",
        resize_mode=read_resize_mode(folder),
        bits=_packed_bits(folder, data),
    )


def assemble(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Loaded:
    """Read an open checkpoint into modules; with `packed` its weights may be in 8 or 4 bits."""
    config, where = source.config, source.folder
    if not packed or dtype is not None:
        check_dense(source)
    tensors = {name: stored.read() for name, stored in source.tensors.items()}
    vq = {name: stored.read() for name, stored in source.vq.items()}
    absent = MissingVQGAN(config.vq_config).to(device).eval()
    return Loaded(
        config=config,
        transformer=build_transformer(config, tensors, where, device, dtype, source.bits),
        vqgan=build_vqgan(config.vq_config, vq, where, device) if vq else absent,
        processor=open_processor(source),
        generation_defaults=source.generation_defaults,
        folder=where,
        resize_mode=source.resize_mode,
    )


def save_hf(
    folder: Path,
    transformer: Transformer,
    vqgan: VQGAN,
    tokenizer_json: str,
    generation_config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    vq_dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
    resize_mode: Mode = "crop",
    kind: str = "chameleon",
) -> None:
    """Write a folder that `load_hf` and transformers read; all of it appears at once, or nothing.

    `resize_mode` is how the model's pictures become squares: that of its `ImageTokenizer`. `kind`
    is that of its `Source`. Weights in 8 or 4 bits stay as they are, whatever `dtype` says, and
    only `Chameleon.load` reads them.
    A folder that is a model already is replaced; any other that is not empty is refused.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not empty and no model: choose another folder")
    config = transformer.config
    named = dtype or transformer.lm_head.weight.dtype
    tokenizer, bits = json.loads(tokenizer_json), packed_bits(transformer)
    texts = _texts(config, tokenizer, generation_config, named, kind, resize_mode, bits)
    texts = {TOKENIZER: tokenizer_json} | texts | dict(extra_files or {})
    vision = {} if isinstance(vqgan, MissingVQGAN) else vqgan.state_dict()
    own = None if bits else dtype
    tensors = {k: Stored.of(v).to(own) for k, v in transformer.state_dict().items()}
    images = {k: Stored.of(v).to(vq_dtype) for k, v in vision.items()}
    with new_folder(folder) as place:
        _write_files(place, _joined(config, tensors, images), texts)


def write_hf(source: Source, folder: Path, files: int | None, step: Step) -> None:
    """Write an open checkpoint into an empty folder, one tensor after the other.

    The weights go to so many `files`, or to as few as keep each under 5 GB; `step` is told the
    bytes of each tensor written.
    """
    tokenizer, kind = read_tokenizer_json(source.tokenizer), source.kind
    dtype = source.tensors[_EMBEDDING].dtype
    defaults, mode = source.generation_defaults, source.resize_mode
    texts = _texts(source.config, tokenizer, defaults, dtype, kind, mode)
    texts[TOKENIZER] = source.tokenizer.read_text(encoding="utf-8")
    tensors = _joined(source.config, source.tensors, source.vq)
    _write_files(folder, tensors, texts, files, step)


def open_processor(source: Source) -> Processor:
    """The processor of an open checkpoint; `CheckpointError` for a tokenizer of another model."""
    processor = Processor(source.tokenizer, source.layout)
    vocabulary, config = processor.vocabulary, source.config
    source.layout.template(vocabulary)
    if source.is_part:  # its config counts the tokens of the part; the whole was checked
        return processor
    if vocabulary.size > config.vocab_size:
        raise CheckpointError(
            f"{source.tokenizer} has {vocabulary.size:,} tokens and the model knows "
            f"{config.vocab_size:,}: give the tokenizer that the model was trained with"
        )
    if vocabulary.num_codes != config.vq_config.num_embeddings:
        raise CheckpointError(
            f"{source.tokenizer} names {vocabulary.num_codes:,} image codes and the model has "
            f"{config.vq_config.num_embeddings:,}: give the tokenizer that it was trained with"
        )
    return processor


def find_tokenizer_file(place: Path) -> Path:
    """A tokenizer file itself, or the one in a folder under transformers' or Meta's name."""
    names = [place, place / TOKENIZER, place / "text_tokenizer.json"]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{place / TOKENIZER} is missing: copy it there from the model that this one was made "
            "from, or write a whole copy with earlyfusion convert and --tokenizer"
        )
    return found


def open_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder: of one file or of those its index names, safetensors or pickles."""
    opened: dict[str, Stored] = {}
    for path in _weight_files(folder):
        if path.suffix == ".bin":
            opened |= open_pickle(path)
        else:
            opened |= _open_safetensors(path)
    return opened


def open_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a file that torch wrote, or of the `state_dict` in it."""

    def open_file() -> dict[str, Tensor]:
        state = torch_load(path)
        state = state.get("state_dict", state)
        return {k: v for k, v in state.items() if isinstance(v, Tensor)}

    file = MappedFile(lambda: open_file().__getitem__)
    return {name: file.stored(name) for name in open_file()}


def build_transformer(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Transformer:
    """A transformer in eval mode that owns `tensors`, named as transformers names them; with `bits`
    they are those of a model that `quantise` has rounded."""
    if config.tie_word_embeddings and _EMBEDDING in tensors:
        tensors = tensors | {_HEAD: tensors[_EMBEDDING]}
    transformer = _empty_transformer(config, bits)
    fill(transformer, tensors, source, device, dtype)
    transformer.tie_weights()
    return accelerate(transformer.eval())


def _empty_transformer(config: ModelConfig, bits: int | None) -> Transformer:
    with torch.device("meta"):
        transformer = Transformer(config)
        return quantise(transformer, bits) if bits else transformer


def build_vqgan(
    config: VQConfig, tensors: dict[str, Tensor], source: Path, device: torch.device | str = "cpu"
) -> VQGAN:
    """A VQ-GAN in eval mode and fp32, without a decoder where `tensors` have none."""
    vqgan = empty_vqgan(config, tensors)
    fill(vqgan, tensors, source, device, torch.float32)
    return accelerate(vqgan.eval())


def empty_vqgan(config: VQConfig, names: Mapping[str, object]) -> VQGAN:
    """A VQ-GAN without values, and without a decoder where `names` has none."""
    with torch.device("meta"):
        return VQGAN(config, with_decoder=has_decoder(names))


def has_decoder(names: Mapping[str, object]) -> bool:
    return any(name.startswith("decoder.") for name in names)


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module its tensors; `CheckpointError` lists keys and shapes that do not match."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    placed = {k: v.to(device=device, dtype=dtype) for k, v in tensors.items()}
    module.load_state_dict(placed, assign=True)


def check(source: Source) -> Source:
    """An open checkpoint, if names, shapes and tokenizer fit its config; no tensor is read."""
    wanted = _empty_transformer(source.config, source.bits).state_dict()
    if source.config.tie_word_embeddings and _EMBEDDING in source.tensors:
        source.tensors.setdefault(_HEAD, source.tensors[_EMBEDDING])
    vision = empty_vqgan(source.config.vq_config, source.vq).state_dict() if source.vq else {}
    source.checked(wanted, vision)
    open_processor(source)
    return source


def _modern(tensors: Mapping[str, Stored], config: ModelConfig, folder: Path) -> dict[str, Stored]:
    try:
        return anole.modern(tensors, config)
    except RuntimeError:
        raise CheckpointError(f"{folder} has heads of another width than its config.json") from None


def _is_vq(name: str) -> bool:
    return name.startswith(VQ_PREFIX)


def _per_head(name: str, stored: Stored, config: ModelConfig) -> Stored:
    """Version 4.43 of transformers, and Lumina, keep one QK-norm for the heads of each shard."""
    for part, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.kv_heads)):
        if f".{part}." in name and len(stored.shape) == 2:
            rows = stored.shape[0]
            if rows < heads and heads % rows == 0:
                repeats = heads // rows
                return stored.then(partial(torch.repeat_interleave, repeats=repeats, dim=0))
    return stored


def _weight_files(folder: Path) -> list[Path]:
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map", {}).values()
            return [folder / name for name in sorted(set(names))]
        if (folder / single).is_file():
            return [folder / single]
    return [folder / WEIGHTS]


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = MappedFile(lambda: safe_open(path, "pt").get_tensor)
        names: list[str] = list(safe_open(path, "pt").keys())  # type: ignore[no-untyped-call]
        return {name: file.stored(name) for name in names}
    except (OSError, SafetensorError):
        raise CheckpointError(
            f"{path} is missing or damaged: download or convert the model again"
        ) from None


def _joined(
    config: ModelConfig, tensors: Mapping[str, Stored], vq: Mapping[str, Stored]
) -> dict[str, Stored]:
    tied = {_HEAD} if config.tie_word_embeddings else set()
    own = {name: stored for name, stored in tensors.items() if name not in tied}
    return own | {VQ_PREFIX + name: stored for name, stored in vq.items()}


def _write_files(
    folder: Path,
    tensors: Mapping[str, Stored],
    texts: Mapping[str, str],
    files: int | None = None,
    step: Step = lambda done: None,
) -> None:
    """Weights first: a folder without config.json is no model."""
    parts = _parts(tensors, files)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = names if len(parts) > 1 else [WEIGHTS]
    for name, part in zip(names, parts, strict=True):
        _write_safetensors(folder / name, part, step)
    if len(parts) > 1:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(stored.nbytes for stored in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, text in sorted(texts.items(), key=lambda entry: entry[0] == "config.json"):
        (folder / name).write_text(text, encoding="utf-8")


def _parts(tensors: Mapping[str, Stored], files: int | None) -> list[dict[str, Stored]]:
    """The tensors in their order, in `files` parts of about equal size, or under 5 GB each."""
    if files is not None and not 1 <= files <= len(tensors):
        raise CheckpointError(
            f"{files} files cannot hold {len(tensors)} tensors: choose 1 to {len(tensors)}"
        )
    total = sum(stored.nbytes for stored in tensors.values())
    limit = _MAX_FILE if files is None else total / files
    parts: list[dict[str, Stored]] = [{}]
    filled, done = 0, 0
    for place, (name, stored) in enumerate(tensors.items()):
        if files is None:
            full = filled > 0 and filled + stored.nbytes > limit
        else:
            few = len(tensors) - place <= files - len(parts)
            full = bool(parts[-1]) and len(parts) < files and (few or done >= limit * len(parts))
        if full:
            parts.append({})
            filled = 0
        parts[-1][name] = stored
        filled += stored.nbytes
        done += stored.nbytes
    return parts


def _write_safetensors(path: Path, tensors: Mapping[str, Stored], step: Step) -> None:
    """The safetensors format by hand: the library's writer holds a file's tensors twice."""
    ordered = sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in ordered:
        span = [at, at + stored.nbytes]
        header[name] = {
            "dtype": _CODES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": span,
        }
        at += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, stored in ordered:
            values = stored.read().cpu().contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
            step(stored.nbytes)


def _generation_config(given: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """What is given, and the ids without which transformers' `generate` does not stop."""
    ids = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    # Beside an eos_token_id, sampling settings are read from "chameleon" alone.
    bare = bool(given) and not given.keys() & {"chameleon", "eos_token_id"}
    own = {"chameleon": dict(given)} if bare else {}
    return ids | {k: v for k, v in given.items() if v is not None} | own


def check_dense(source: Source) -> None:
    """`CheckpointError` where the weights are in 8 or 4 bits."""
    if source.bits is not None:
        raise CheckpointError(
            f"{source.folder} holds weights in {source.bits} bits, which only Chameleon.load reads,"
            " on one process and in the dtype they have: give the model that they were made from"
        )


def _packed_bits(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The bits of weights that `save_hf` wrote packed."""
    packed = config.get("quantization_config")
    if not isinstance(packed, dict) or packed.get("quant_method") != PACKED:
        return None
    if packed.get("bits") not in (8, 4):
        raise CheckpointError(
            f"{folder / 'config.json'} names weights of {packed.get('bits')!r} bits: "
            "8 and 4 are known"
        )
    return int(packed["bits"])


def papers(folder: Path | None) -> dict[str, str]:
    """The model card of a folder, and what its licence asks copies to keep."""
    found = [] if folder is None else [p for name in PAPERS for p in sorted(folder.glob(name))]
    return {p.name: p.read_text(encoding="utf-8", errors="replace") for p in found if p.is_file()}


def read_resize_mode(folder: Path) -> Mode:
    """How a folder's pictures become squares: "crop" where no file of it says "fit".

    transformers writes the image processor's settings into either of two files.
    """
    settings = read_json(folder / PROCESSOR, needed=False).get("image_processor")
    alone = read_json(folder / "preprocessor_config.json", needed=False)
    mode = (settings if isinstance(settings, dict) else alone).get("resize_mode", "crop")
    if mode not in get_args(Mode):
        raise CheckpointError(
            f"resize_mode={mode!r} in {folder / PROCESSOR} is unknown: write 'crop' or 'fit'"
        )
    return mode


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is missing or not JSON: get the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: get the file again")
    return data


def _texts(
    config: ModelConfig,
    tokenizer: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    dtype: torch.dtype,
    kind: str = "chameleon",
    resize_mode: Mode = "crop",
    bits: int | None = None,
) -> dict[str, str]:
    vocabulary = Vocabulary.from_dict(tokenizer)
    placeholder = next((n for n in IMAGE_PLACEHOLDERS if n in vocabulary.names), None)
    # What transformers looks up to embed pictures; its model cannot be built without.
    images = {n: i for n, i in vocabulary.names.items() if n.startswith(IMAGE_PREFIX)}
    if vocabulary.image_placeholder is not None:
        images["<image>"] = vocabulary.image_placeholder
    more: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "vocabulary_map": images}
    if kind != "chameleon":
        more[lumina.MARK] = kind
    if bits is not None:
        more["quantization_config"] = {"quant_method": PACKED, "bits": bits}
    files = {
        "config.json": config.to_dict() | more,
        "generation_config.json": _generation_config(generation_config, vocabulary),
        "tokenizer_config.json": _tokenizer_config(config, placeholder),
        PROCESSOR: _processor_config(config.vq_config, placeholder, resize_mode),
    }
    return {name: json.dumps(data, indent=2) + "\n" for name, data in files.items()}


def _tokenizer_config(config: ModelConfig, placeholder: str | None) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "sep_token": END_OF_TURN,
        "image_token": placeholder,
        "boi_token": BEGIN_IMAGE,
        "eoi_token": END_IMAGE,
        "clean_up_tokenization_spaces": False,
        # `generate` goes on at the end of a row: a batch must be padded before its beginning.
        "padding_side": "left",
    }


def _processor_config(vq: VQConfig, placeholder: str | None, mode: Mode) -> dict[str, Any]:
    side = vq.resolution
    return {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": vq.grid**2,
        "image_token": placeholder,
        "image_processor": {
            "image_processor_type": "ChameleonImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "rescale_factor": 2 / 255,
            "image_mean": [1.0, 1.0, 1.0],
            "image_std": [1.0, 1.0, 1.0],
            "resize_mode": mode,
        },
    }
