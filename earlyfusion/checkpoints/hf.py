"""transformers' layout: config.json, safetensors and tokenizer.json, read and written. The
transformer's parameters have the names of these files. The VQ-GAN's are under `model.vqmodel.`,
with the decoder that transformers leaves out."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open

from earlyfusion.checkpoints import anole, lumina
from earlyfusion.checkpoints.source import (
    CHAT_TEMPLATE_FILE,
    EMBEDDING,
    HEAD,
    TOKENIZER,
    MappedFile,
    OnBytes,
    Source,
    Stored,
    find_tokenizer_file,
    open_torch_file,
    read_json,
)
from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.files import new_folder
from earlyfusion.image_tokenizer import MissingVQGAN, Mode
from earlyfusion.model.quantise import packed_bits
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
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
PROCESSOR = "processor_config.json"
PACKED = "earlyfusion"  # quant_method of weights that this package packs
VQ_PREFIX = "model.vqmodel."
_MAX_FILE_BYTES = 5_000_000_000
# dtype names of the safetensors format.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

_PLACEHOLDER = IMAGE_PLACEHOLDERS[1]
# Turns as in training: their parts joined, then end of turn; a last answer ends with eos. A newline
# joins a system message to the user's next to it. `generation` blocks hold the parts that are
# learned.
CHAT_TEMPLATE = (
    "{% macro said(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] in ['image', 'image_url'] %}" + _PLACEHOLDER + "{% else %}"
    "{{ raise_exception('a part of type ' ~ part['type'] ~ ' is unknown: write text or image') }}"
    "{% endif %}{% endfor %}{% endif %}{% endmacro %}" + BOS + "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('role ' ~ message['role'] ~ ' is unknown: "
    "a message is by user, assistant or system') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ said(message) }}{% if loop.last %}" + EOS + "{% endif %}{% endgeneration %}"
    "{% else %}{{ said(message) }}{% endif %}"
    "{% set next = messages[loop.index]['role'] if not loop.last else '' %}"
    "{% if [message['role'], next] in "
    "[['system', 'user'], ['user', 'system'], ['system', 'system']] %}{{ '\n' }}"
    "{% elif not loop.last or message['role'] != 'assistant' %}" + END_OF_TURN + "{% endif %}"
    "{% endfor %}"
)


def open_hf(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a folder in transformers' layout, today's or that of its early versions. `tokenizer` is
    a tokenizer file, or a folder with one, to use instead of the folder's own."""
    data = read_json(folder / "config.json")
    config = ModelConfig.from_dict(data)
    config.check()
    tensors = open_tensors(folder)
    vq_names = [name for name in tensors if name.startswith(VQ_PREFIX)]
    vq = {name.removeprefix(VQ_PREFIX): tensors.pop(name) for name in vq_names}
    # Old versions of transformers stored the rotary frequencies; here they are computed.
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if anole.is_early(tensors):
        tensors = _to_current_names(tensors, config, folder)
    config = _untie_if_stored_separately(config, tensors)
    grid, is_lumina = config.vq_config.grid, lumina.is_lumina(data)
    defaults = {"chameleon": lumina.SAMPLING} if is_lumina else {}
    generation_config = read_json(folder / "generation_config.json", needed=False)
    return Source(
        folder=folder,
        config=config,
        tensors={name: _expand_norm(name, s, config) for name, s in tensors.items()},
        vq=vq,
        tokenizer=find_tokenizer_file(tokenizer or folder),
        layout=lumina.layout(grid) if is_lumina else ImageLayout(grid, grid),
        generation_defaults=defaults | generation_config,
        family=lumina.FAMILY if is_lumina else "chameleon",
        resize_mode=read_resize_mode(folder),
        bits=_packed_bits(folder, data),
    )


def save_hf(
    folder: Path,
    transformer: Transformer,
    vqgan: VQGAN | MissingVQGAN,
    tokenizer_json: str,
    generation_config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    vq_dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
    resize_mode: Mode = "crop",
    family: str = "chameleon",
) -> None:
    """Write modules as a model folder, which appears whole or not at all. `resize_mode` is the
    `mode` of the model's `ImageTokenizer`, `family` that of its `Source`. 8- and 4-bit weights are
    written as they are, whatever `dtype` is; transformers cannot read them. A folder that holds a
    model is replaced. Raises `CheckpointError` for any other non-empty folder."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not empty and does not hold a model: choose another folder"
        )
    config, bits = transformer.config, packed_bits(transformer)
    vocabulary = Vocabulary.from_dict(json.loads(tokenizer_json))
    files = _config_files(
        config,
        vocabulary,
        generation_config,
        dtype or transformer.lm_head.weight.dtype,
        family,
        resize_mode,
        bits,
    )
    new_dtype = None if bits else dtype
    tensors = {k: Stored.of(v).to(new_dtype) for k, v in transformer.state_dict().items()}
    vq = {k: Stored.of(v).to(vq_dtype) for k, v in vqgan.state_dict().items()}
    with new_folder(folder) as unfinished:
        _write_weights(unfinished, _all_tensors(config, tensors, vq))
        _write_texts(unfinished, {TOKENIZER: tokenizer_json} | files | dict(extra_files or {}))


def copy_to_hf(source: Source, folder: Path, shards: int | None, on_bytes: OnBytes) -> None:
    """Write an open checkpoint into an empty folder, one tensor after the other. `shards` is the
    number of weight files (None: as few as keep each under 5 GB)."""
    files = _config_files(
        source.config,
        Vocabulary.from_dict(read_tokenizer_json(source.tokenizer)),
        source.generation_defaults,
        source.tensors[EMBEDDING].dtype,
        source.family,
        source.resize_mode,
    )
    _write_weights(folder, _all_tensors(source.config, source.tensors, source.vq), shards, on_bytes)
    _write_texts(folder, files | {TOKENIZER: source.tokenizer.read_text(encoding="utf-8-sig")})


def open_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder: of its one file or those in its index, safetensors or pickles."""
    tensors: dict[str, Stored] = {}
    for path in _weight_files(folder):
        in_file = open_torch_file(path) if path.suffix == ".bin" else _open_safetensors(path)
        if repeated := sorted(tensors.keys() & in_file.keys()):
            raise CheckpointError(
                f"{path} holds {repeated[0]}, as another weight file does: remove it from one of "
                "them"
            )
        tensors |= in_file
    return tensors


def _untie_if_stored_separately(config: ModelConfig, tensors: dict[str, Stored]) -> ModelConfig:
    """The config, untied if the files hold a head that differs from the embedding although
    config.json ties the two: as in transformers, the files decide. If they hold the head only, adds
    it to `tensors` as the embedding."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors[HEAD]
        return config
    embedding, head = (tensors[name].read() for name in (EMBEDDING, HEAD))
    is_tied = torch.equal(embedding.to(head.dtype), head)
    return config if is_tied else replace(config, tie_word_embeddings=False)


def _to_current_names(
    tensors: Mapping[str, Stored], config: ModelConfig, folder: Path
) -> dict[str, Stored]:
    try:
        return anole.to_current(tensors, config)
    except RuntimeError:
        raise CheckpointError(
            f"{folder} has heads of another width than its config.json says: get both again"
        ) from None


def _expand_norm(name: str, stored: Stored, config: ModelConfig) -> Stored:
    """The tensor; a QK-norm with fewer rows than heads is repeated. transformers 4.43 and Lumina
    store one for all heads of a shard."""
    for norm, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.kv_heads)):
        if f".{norm}." in name and len(stored.shape) == 2:
            rows = stored.shape[0]
            if rows < heads and heads % rows == 0:
                repeats = heads // rows
                return stored.then(partial(torch.repeat_interleave, repeats=repeats, dim=0))
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, of which some may be missing."""
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise CheckpointError(
                    f"{folder / index} names no weight file for each tensor: get the file again"
                )
            return [folder / name for name in sorted(set(names.values()))]
        if (folder / single).is_file():
            return [folder / single]
    return [folder / WEIGHTS]


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = MappedFile(lambda: safe_open(path, "pt").get_tensor)
        names: list[str] = list(safe_open(path, "pt").keys())  # type: ignore[no-untyped-call]
        return {name: file.stored(name) for name in names}
    except (OSError, ValueError, SafetensorError):
        raise CheckpointError(
            f"{path} is missing or damaged: download or convert the model again"
        ) from None


def _all_tensors(
    config: ModelConfig, tensors: Mapping[str, Stored], vq: Mapping[str, Stored]
) -> dict[str, Stored]:
    """All tensors under their names in the files; a tied head is left out."""
    tied = {HEAD} if config.tie_word_embeddings else set()
    stored = {name: tensor for name, tensor in tensors.items() if name not in tied}
    return stored | {VQ_PREFIX + name: tensor for name, tensor in vq.items()}


def _write_weights(
    folder: Path,
    tensors: Mapping[str, Stored],
    count: int | None = None,
    on_bytes: OnBytes = lambda size: None,
) -> None:
    """Write tensors to `count` files (None: as few as possible), with an index if there are
    several."""
    shards = _split_into_shards(tensors, count)
    if len(shards) == 1:
        _write_safetensors(folder / WEIGHTS, tensors, on_bytes)
        return
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / name, shard, on_bytes)
        file_of |= dict.fromkeys(shard, name)
    total = sum(stored.nbytes for stored in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    # config.json comes last: without it, nothing takes the folder for a model.
    for name, text in sorted(texts.items(), key=lambda entry: entry[0] == "config.json"):
        (folder / name).write_text(text, encoding="utf-8")


def _split_into_shards(tensors: Mapping[str, Stored], count: int | None) -> list[dict[str, Stored]]:
    """The tensors in order, in `count` shards of about equal size, or under 5 GB each."""
    if count is not None and not 1 <= count <= len(tensors):
        raise CheckpointError(
            f"{count} files cannot hold {len(tensors)} tensors: choose 1 to {len(tensors)}"
        )
    total = sum(stored.nbytes for stored in tensors.values())
    limit = _MAX_FILE_BYTES if count is None else total / count
    shards: list[dict[str, Stored]] = [{}]
    shard_bytes, assigned_bytes = 0, 0
    for number, (name, stored) in enumerate(tensors.items()):
        if count is None:
            starts_shard = shard_bytes > 0 and shard_bytes + stored.nbytes > limit
        else:
            # Leave at least one tensor for each remaining shard.
            is_needed = len(tensors) - number <= count - len(shards)
            on_schedule = is_needed or assigned_bytes >= limit * len(shards)
            starts_shard = bool(shards[-1]) and len(shards) < count and on_schedule
        if starts_shard:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = stored
        shard_bytes += stored.nbytes
        assigned_bytes += stored.nbytes
    return shards


def _write_safetensors(path: Path, tensors: Mapping[str, Stored], on_bytes: OnBytes) -> None:
    """Write a file with one tensor in memory at a time."""
    # Written by hand, because the library's writer holds all tensors of a file twice. The format:
    # 8 bytes with the length of a JSON header, the header, the values.
    ordered = sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in ordered:
        header[name] = {
            "dtype": _DTYPE_NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.nbytes],
        }
        offset += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values must begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, stored in ordered:
            values = stored.read().cpu().contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
            on_bytes(stored.nbytes)


def _generation_config(settings: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json: these settings, and the ids that make transformers' `generate`
    stop."""
    ids = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    # In a file with an eos_token_id, this package reads only the settings under "chameleon".
    needs_copy = bool(settings) and not settings.keys() & {"chameleon", "eos_token_id"}
    chameleon_settings = {"chameleon": dict(settings)} if needs_copy else {}
    return ids | {k: v for k, v in settings.items() if v is not None} | chameleon_settings


def _packed_bits(folder: Path, config: Mapping[str, Any]) -> int | None:
    """8 or 4 for weights that `save_hf` wrote packed, else None."""
    packed = config.get("quantization_config")
    if not isinstance(packed, dict) or packed.get("quant_method") != PACKED:
        return None
    if packed.get("bits") not in (8, 4):
        raise CheckpointError(
            f"{folder / 'config.json'} names weights of {packed.get('bits')!r} bits: "
            "write 8 or 4, or save the model again"
        )
    return int(packed["bits"])


def read_resize_mode(folder: Path) -> Mode:
    """How images become squares: "crop" unless a file of the folder says "fit"."""
    # transformers writes the image processor's settings into one of two files.
    settings = read_json(folder / PROCESSOR, needed=False).get("image_processor")
    older = read_json(folder / "preprocessor_config.json", needed=False)
    mode = (settings if isinstance(settings, dict) else older).get("resize_mode", "crop")
    if mode not in get_args(Mode):
        raise CheckpointError(
            f"resize_mode={mode!r} in {folder / PROCESSOR} is unknown: write 'crop' or 'fit'"
        )
    return mode


def _config_files(
    config: ModelConfig,
    vocabulary: Vocabulary,
    generation_config: Mapping[str, Any],
    dtype: torch.dtype,
    family: str,
    resize_mode: Mode,
    bits: int | None = None,
) -> dict[str, str]:
    """The texts of the JSON files and of the chat template, by name."""
    placeholder = next((n for n in IMAGE_PLACEHOLDERS if n in vocabulary.names), None)
    # transformers embeds images by these names and cannot build a model without them.
    images = {n: i for n, i in vocabulary.names.items() if n.startswith(IMAGE_PREFIX)}
    if vocabulary.image_placeholder is not None:
        images["<image>"] = vocabulary.image_placeholder
    extra: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "vocabulary_map": images}
    if family != "chameleon":
        extra[lumina.CONFIG_KEY] = family
    if bits is not None:
        extra["quantization_config"] = {"quant_method": PACKED, "bits": bits}
    files = {
        "config.json": config.to_dict() | extra,
        "generation_config.json": _generation_config(generation_config, vocabulary),
        "tokenizer_config.json": _tokenizer_config(config, placeholder),
        PROCESSOR: _processor_config(config.vq_config, placeholder, resize_mode),
    }
    texts = {name: json.dumps(data, indent=2) + "\n" for name, data in files.items()}
    return texts | {CHAT_TEMPLATE_FILE: CHAT_TEMPLATE}


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
        # `generate` continues at the end of each row, so batches are padded at the start.
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
