from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.vocabulary import CODE, ImageLayout, Vocabulary, code_name, control_and_image_names


def sha256(ids: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def full_size_names() -> dict[str, int]:
    """The map of `rule_65536` in vocab.json."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {code_name(code): 4 + code for code in range(8192)}
    names |= {f"<reserved{i - 4:05d}>": i for i in range(8198, 16384)}
    return names | {"<": 16384} | {f"t{i}": i for i in range(16385, 65536)}


@pytest.fixture(scope="module", params=["tiny_tokenizer", "rule_65536"])
def case(request: pytest.FixtureRequest, golden: Path) -> tuple[Vocabulary, dict[str, Any]]:
    expected = json.loads((golden / "expected/vocab.json").read_text())[request.param]
    if request.param == "tiny_tokenizer":
        return Vocabulary.from_file(golden / "tokenizer/text_tokenizer.json"), expected
    return Vocabulary(full_size_names()), expected


@pytest.fixture(scope="module")
def vocabulary(golden: Path) -> Vocabulary:
    return Vocabulary.from_file(golden / "tokenizer/text_tokenizer.json")


def test_control_ids(case: tuple[Vocabulary, dict[str, Any]]) -> None:
    vocabulary, expected = case
    assert vocabulary.size == expected["n_all"]
    assert (vocabulary.bos, vocabulary.eos) == (
        expected["begin_sequence"],
        expected["end_sequence"],
    )
    assert vocabulary.begin_image == expected["begin_image"]
    assert vocabulary.end_image == expected["end_image"]
    assert (vocabulary.pad, vocabulary.end_of_turn) == (expected["padding"], expected["end_turn"])
    assert vocabulary.image_placeholder == expected["end_turn"] + 1


def test_kinds_and_codes(case: tuple[Vocabulary, dict[str, Any]]) -> None:
    vocabulary, expected = case
    assert sha256(vocabulary.image_tokens) == expected["sha256_image_tokens_i64"]
    assert sha256(vocabulary.control_tokens) == expected["sha256_special_tokens_i64"]
    assert sha256(vocabulary.text_tokens) == expected["sha256_text_tokens_i64"]
    assert sha256(vocabulary.code_to_token) == expected["sha256_img2bpe_tensor_i64"]
    codes = vocabulary.tokens_to_codes(vocabulary.image_tokens)
    assert sha256(codes) == expected["sha256_convert_bpe2img_of_image_tokens_i64"]
    pairs = np.stack([vocabulary.image_tokens, codes], axis=1)
    assert sha256(pairs) == expected["sha256_bpe2img_pairs_i64"]
    for name, (token, code) in expected["bpe2img_samples"].items():
        assert (vocabulary.id_of(name), code_name(code)) == (token, name)


def test_placeholder_by_its_name_in_transformers() -> None:
    names = {name: token for token, name in enumerate(control_and_image_names(2))}
    placeholder = names.pop("<reserved08707>")
    assert Vocabulary(names).image_placeholder is None
    assert Vocabulary(names | {"<image>": placeholder}).image_placeholder == placeholder


def test_shuffled_ids_of_codes_keep_their_names() -> None:
    names = {name: token for token, name in enumerate(control_and_image_names(12))}
    names["IMGIMGBBZ"], names["IMGIMGAZ"] = names["IMGIMGAZ"], names["IMGIMGBBZ"]
    vocabulary = Vocabulary(names)
    assert vocabulary.code_to_token[[0, 11]].tolist() == [15, 4]
    assert vocabulary.tokens_to_codes([[15, 4]]).tolist() == [[0, 11]]
    assert vocabulary.image_tokens.tolist() == list(range(4, 16))


def without(name: str) -> dict[str, int]:
    return {n: i for i, n in enumerate(control_and_image_names(12)) if n != name}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (without("<racm3:break>"), "the tokenizer has no token <racm3:break>"),
        (without("<reserved08706>"), "no token <reserved08706>"),
        (without("IMGIMGFZ"), "none for code 5"),
        ({n: i for i, n in enumerate(control_and_image_names(0))}, "none for code 0"),
        (without("") | {"extra": 7}, "share the id 7"),
        (without("") | {"IMGIMGAFZ": 99}, "'IMGIMGAFZ' is not the name of an image token"),
        (without("") | {"IMGIMGKZ": 99}, "'IMGIMGKZ' is not the name of an image token"),
        (without("") | {"IMGIMG": 99}, "'IMGIMG' is not the name of an image token"),
        (without("") | {"x": -1}, "has the id -1"),
        (without("") | {"x": 2**70}, "has the id 1180591620717411303424"),
    ],
)
def test_bad_vocabularies(names: dict[str, int], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        Vocabulary(names)


def test_bad_files(tmp_path: Path) -> None:
    names = {n: i for i, n in enumerate(control_and_image_names(12))}
    added = {"model": {"vocab": {}}, "added_tokens": [{"content": "<s>"}]}
    for name, text, sentence in (
        ("no.json", None, "no.json is missing or not JSON"),
        ("cut.json", "{", "cut.json is missing or not JSON"),
        ("half.json", b"\xff{}", "half.json is missing or not JSON"),
        ("list.json", "[]", "list.json is not a JSON object: a model needs its tokenizer file"),
        ("empty.json", "{}", "the tokenizer file has no model.vocab"),
        ("none.json", '{"model": null}', "the tokenizer file has no model.vocab"),
        ("added.json", json.dumps(added), "the tokenizer file has no model.vocab"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError, match=sentence):
            Vocabulary.from_file(tmp_path / name)
    full = {"model": {"vocab": names}, "added_tokens": [{"content": "new", "id": 99}]}
    (tmp_path / "whole.json").write_text(json.dumps(full))
    assert Vocabulary.from_file(tmp_path / "whole.json").names == names | {"new": 99}


def test_tokens_and_codes_outside(vocabulary: Vocabulary) -> None:
    for token in (-1, 3, 516, 1280, 10**9):
        with pytest.raises(ImageError, match=f"token {token} is not an image token"):
            vocabulary.tokens_to_codes([4, token])
    for code in (-1, 512):
        with pytest.raises(ImageError, match=f"image code {code} is outside"):
            vocabulary.codes_to_tokens([0, code])


def test_layout_of_chameleon(vocabulary: Vocabulary) -> None:
    layout = ImageLayout(2, 3)
    codes = np.array([[0, 1, 511], [7, 7, 9]])
    tokens = layout.spell(codes, vocabulary)
    assert tokens == [517, 4, 5, 515, 11, 11, 13, 516]
    assert all(type(token) is int for token in tokens)
    assert layout.num_codes == 6 and layout.num_tokens == 8
    np.testing.assert_array_equal(layout.parse(tokens, vocabulary), codes)
    assert ImageLayout(32, 32).num_tokens == 1026


def test_layout_with_size_tokens_and_line_ends(vocabulary: Vocabulary) -> None:
    """Lumina-mGPT's spelling of 512 x 512 takes 32 * 33 + 4 tokens."""
    size = "<reserved08816>"
    layout = ImageLayout(32, 32, ("<racm3:break>", size, size), ("<reserved08799>",))
    codes = np.arange(1024).reshape(32, 32) % 512
    tokens = layout.spell(codes, vocabulary)
    assert len(tokens) == layout.num_tokens == 1060
    assert tokens[:4] == [517, vocabulary.id_of(size), vocabulary.id_of(size), 4]
    assert tokens[35] == tokens[-2] == vocabulary.id_of("<reserved08799>")
    assert (layout.template(vocabulary) == CODE).sum() == 1024
    np.testing.assert_array_equal(layout.parse(tokens, vocabulary), codes)


def test_layout_errors(vocabulary: Vocabulary) -> None:
    layout = ImageLayout(2, 3)
    with pytest.raises(ImageError, match="shape 3x2, this model's images have 2x3"):
        layout.spell(np.zeros((3, 2)), vocabulary)
    with pytest.raises(ImageError, match="an image of 3 tokens is not whole"):
        layout.parse([517, 4, 516], vocabulary)
    with pytest.raises(ImageError, match="token 4 at position 7"):
        layout.parse([517, 4, 4, 4, 4, 4, 4, 4], vocabulary)
    with pytest.raises(ImageError, match="token 700 is not an image token"):
        layout.parse([517, 4, 4, 700, 4, 4, 4, 516], vocabulary)
    with pytest.raises(ImageError, match="0 x 3 codes is empty"):
        ImageLayout(0, 3)
