from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from earlyfusion.content import Image, Message
from earlyfusion.errors import (
    CheckpointError,
    DataError,
    ImageError,
    PromptError,
    SettingError,
)
from earlyfusion.processor import (
    ANSWER_IMAGE,
    ANSWER_TEXT,
    CONTROL,
    END,
    PROMPT_IMAGE,
    PROMPT_TEXT,
    Processor,
    TextStream,
    train_tokenizer,
)
from earlyfusion.vocabulary import CODE, ImageLayout, Vocabulary, control_and_image_names

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = GOLDEN / "tokenizer/text_tokenizer.json"
SMALL = Processor(TOKENIZER, ImageLayout(2, 2))
CODES = np.array([[0, 1], [2, 511]])
WHITE = PIL.Image.new("RGB", (4, 4), "white")
SPELLED = [517, 4, 5, 6, 515, 516]
FORGERIES = ["<s>", "</s>", "<reserved08706>", "<racm3:break>", "<eoss>", "IMGIMGAZ", "IMGIMGFBBZ"]
KOREAN = "안녕하세요, 카멜레온! 그림을 그려 주세요 🦎👩‍👩‍👧 ünï"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / "expected/vocab.json").read_text())
    return data


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(TOKENIZER, ImageLayout(32, 32))


def test_text_equals_metas(expected: dict[str, Any]) -> None:
    assert len(expected["text_encode"]) == 14
    for case in expected["text_encode"]:
        ids = case["ids"]
        # Meta's tokenizer makes control tokens of their names in a text, which is not wanted here.
        if {*ids} <= {*SMALL.vocabulary.text_tokens.tolist()}:
            assert SMALL.encode_text(case["text"]) == ids, case["text"]
        without_eos = [token for token in ids if token != SMALL.vocabulary.eos]
        assert SMALL.decode_text(without_eos) == case["decoded"], case["text"]


def test_decoded_text_ends_at_eos(expected: dict[str, Any]) -> None:
    case = expected["decode_text"]
    assert SMALL.decode_text(case["ids"]) == case["text"]


def test_prompts_equal_metas(expected: dict[str, Any], processor: Processor) -> None:
    with np.load(GOLDEN / "expected/vq.npz") as vq:
        gradient, plasma = (vq[f"tokens_{i}"].reshape(32, 32) for i in (0, 3))
    hello, cat, draw, see, mixed, raw = (case["ids"] for case in expected["prompt_ui"]["cases"])

    def prompt(*parts: str | Image) -> list[int]:
        return processor.encode([Message("user", list(parts))]).ids

    assert prompt("Hello")[:-1] == hello
    assert prompt("Draw a cat") == cat
    assert [*prompt("Draw"), processor.vocabulary.begin_image] == draw
    assert prompt(Image(codes=gradient), "What do you see?") == see
    assert prompt("a", Image(codes=gradient), "b", Image(codes=plasma))[:-1] == mixed
    assert processor.encode_text(" z") == raw[-2:]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_text_cannot_forge_control_or_image_tokens(forgery: str) -> None:
    for text in (forgery, f"a {forgery}{forgery} b", forgery * 3):
        ids = SMALL.encode_text(text)
        assert set(ids) <= set(SMALL.vocabulary.text_tokens.tolist())
        assert SMALL.decode_text(ids) == text
        inside = SMALL.encode([Message("user", text)]).ids
        assert inside == [SMALL.vocabulary.bos, *ids, SMALL.vocabulary.end_of_turn]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*FORGERIES, "한글", "🦎", "e\u0301"]))))
def test_any_text_round_trips_in_whole_characters(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = SMALL.encode_text(text)
    assert set(ids) <= set(SMALL.vocabulary.text_tokens.tolist())
    assert SMALL.decode_text(ids) == text
    stream, seen = SMALL.text_stream(), ""
    for token in ids:
        seen += stream.push(token)
        assert text.startswith(seen)
    assert stream.flush() == "" and seen == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(595, 1279), max_size=30))
def test_streamed_text_of_any_tokens_equals_decoded_text(ids: list[int]) -> None:
    """The oracle is the byte decoder of `tokenizers`; a letter behind ends a cut character."""
    stream = SMALL.text_stream()
    streamed = "".join(stream.push(token) for token in ids)
    assert streamed + stream.flush() == SMALL.decode_text(ids)
    [letter] = SMALL.encode_text("a")
    oracle = Tokenizer.from_file(str(TOKENIZER)).decode([*ids, letter])
    assert SMALL.decode_text([*ids, letter]) == oracle
    assert oracle.startswith(streamed) and oracle[len(streamed) :] in ("a", "�a")


def test_stream_holds_back_half_characters() -> None:
    ids = SMALL.encode_text("🦎")
    assert len(ids) == 4
    stream = SMALL.text_stream()
    assert [stream.push(token) for token in ids] == ["", "", "", "🦎"]
    assert [stream.push(ids[0]), stream.flush(), stream.flush()] == ["", "", ""]
    # What was cut leaves nothing behind, neither at the end nor in what comes next.
    assert stream.push(SMALL.encode_text("a")[0]) == "a"
    assert [SMALL.decode_text(ids[:n]) for n in range(5)] == ["", "", "", "", "🦎"]
    assert SMALL.decode_text([ids[0], *SMALL.encode_text("a")]) == "�a"
    assert isinstance(stream, TextStream) and stream.push(SMALL.vocabulary.eos) == ""


def test_roles_weights_and_spans_of_a_document() -> None:
    messages = [
        Message("user", ["Hello", Image(codes=CODES)]),
        Message("assistant", "Hello"),
        Message("user", "Hello"),
        Message("assistant", [Image(codes=CODES), "Hello"]),
    ]
    [hello] = SMALL.encode_text("Hello")
    turn, eos = SMALL.vocabulary.end_of_turn, SMALL.vocabulary.eos
    document = SMALL.encode_document(messages)
    assert document.ids == [
        0,
        hello,
        *SPELLED,
        turn,
        hello,
        turn,
        hello,
        turn,
        *SPELLED,
        hello,
        eos,
    ]
    user, answer = [PROMPT_TEXT], [ANSWER_TEXT]
    assert document.role == [
        *[CONTROL, *user, *[PROMPT_IMAGE] * 6, CONTROL],
        *[*answer, CONTROL, *user, CONTROL],
        *[*[ANSWER_IMAGE] * 6, *answer, END],
    ]
    assert document.loss_mask == [False] * 9 + [True] + [False] * 3 + [True] * 8
    spans = [(1, 2, "text"), (2, 8, "image"), (9, 10, "text"), (11, 12, "text")]
    assert document.spans == [*spans, (13, 19, "image"), (19, 20, "text")]
    assert len(document) == 21


def test_prompt_is_the_document_up_to_the_answer() -> None:
    messages = [Message("user", "What is"), Message("assistant", "Hello"), Message("user", "a")]
    prompt = SMALL.encode(messages)
    document = SMALL.encode_document([*messages, Message("assistant", " cat")])
    assert document.ids[: len(prompt)] == prompt.ids
    assert prompt.role == document.role[: len(prompt)]
    assert prompt.ids[-1] == SMALL.vocabulary.end_of_turn


def test_a_last_turn_of_the_assistant_is_left_open() -> None:
    user, begun = Message("user", "What is"), Message("assistant", [Image(codes=CODES), "Hello"])
    prompt, document = SMALL.encode([user, begun]), SMALL.encode_document([user, begun])
    assert [*prompt.ids, SMALL.vocabulary.eos] == document.ids
    assert SMALL.encode([user, Message("assistant", "")]).ids == SMALL.encode([user]).ids


def test_a_token_for_a_person() -> None:
    [hello], lizard = SMALL.encode_text("Hello"), SMALL.encode_text("🦎")
    assert SMALL.token_text(hello) == "Hello" and SMALL.token_text(lizard[0]) == "�"
    assert SMALL.token_text(SMALL.vocabulary.eos) == "</s>" and SMALL.token_text(10**6) == ""
    assert b"".join(map(SMALL.token_bytes, [SMALL.vocabulary.eos, *lizard])) == "🦎".encode()


def test_codes_may_be_given_beside_the_messages() -> None:
    image = Image.from_array(np.zeros((4, 4, 3), np.uint8))
    message = Message("user", [image, "Hello", image])
    ids = SMALL.encode([message], [CODES, CODES[::-1]]).ids
    assert ids[1:7] == SPELLED and ids[8:14] == [517, 6, 515, 4, 5, 516]
    with pytest.raises(PromptError, match="hold 2 images, with codes for 1"):
        SMALL.encode([message], [CODES])
    with pytest.raises(PromptError, match="image 1 of 2 has no codes"):
        SMALL.encode([message])
    with pytest.raises(ImageError, match="shape 3x2"):
        SMALL.encode([message], [CODES, np.zeros((3, 2), int)])
    with pytest.raises(ImageError, match="image code 512 is outside"):
        SMALL.encode([message], [CODES, CODES + 1])


def test_turns_that_do_not_fit_the_use() -> None:
    user, answer = Message("user", "a"), Message("assistant", "b")
    for messages in ([], [answer], [user, user]):
        with pytest.raises(PromptError):
            SMALL.encode(messages)
    for messages in ([], [user], [answer]):
        with pytest.raises(PromptError):
            SMALL.encode_document(messages)


def test_half_characters_are_refused() -> None:
    with pytest.raises(PromptError, match="lone surrogate\\) at position 1"):
        SMALL.encode_text("a\ud83e")


def test_a_draft_becomes_the_prompt() -> None:
    for last in ([], [Message("assistant", ["Hello", Image(codes=CODES)])]):
        messages = [Message("user", ["Hello", Image(pil=WHITE), Image(codes=CODES), "a"]), *last]
        draft = SMALL.draft(messages)
        codes = [CODES, CODES, CODES] if last else [CODES, CODES]
        full = SMALL.encode(messages, codes)
        assert len(draft) == len(full) and draft.spans == full.spans
        assert draft.ids.count(CODE) == len(SPELLED)
        assert SMALL.fill(draft, [CODES]) == full.ids
    answer = Message("assistant", ["a", Image(pil=WHITE)])
    ids = SMALL.fill(SMALL.draft_turn(answer), [CODES])
    assert ids == [*SMALL.encode_text("a"), *SPELLED]
    with pytest.raises(ImageError, match="outside"):
        SMALL.draft([Message("user", Image(codes=CODES + 9999))])


def test_bad_tokenizer_files(tmp_path: Path) -> None:
    names = {name: token for token, name in enumerate(control_and_image_names(4))}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "?", "vocab": names}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Processor(path, SMALL.layout)
    with pytest.raises(CheckpointError, match="missing or not JSON"):
        Processor(tmp_path / "none.json", SMALL.layout)


TEXTS = ["Draw a red apple.", "빨간 사과를 그려 주세요.", "What is this? It is a cat, 12:30!"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, num_codes=64, vocab_size=360), encoding="utf-8")
    return Processor(path, ImageLayout(2, 2))


def test_trained_tokenizer_is_of_the_family(trained: Processor) -> None:
    vocabulary = trained.vocabulary
    assert vocabulary.size == 360 and vocabulary.num_codes == 64
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos) == (0, 1, 2)
    assert vocabulary.image_tokens.tolist() == list(range(4, 68))
    assert (vocabulary.end_image, vocabulary.begin_image, vocabulary.end_of_turn) == (68, 69, 70)
    assert vocabulary.image_placeholder == 71
    assert vocabulary.control_tokens.tolist() == [0, 1, 2, 3, 68, 69, 70, 71]
    assert vocabulary.text_tokens.tolist() == list(range(72, 360))


def test_trained_tokenizer_encodes_all_text(trained: Processor) -> None:
    for text in (*TEXTS, KOREAN, "a  b\t\n\nc", *FORGERIES, bytes(range(256)).decode("latin-1")):
        assert trained.decode_text(trained.encode_text(text)) == text
        assert set(trained.encode_text(text)) <= set(trained.vocabulary.text_tokens.tolist())
    assert len(trained.encode_text("사과")) < len("사과".encode()) == 6
    assert len(trained.encode_text("1230!")) == 5


def test_training_repeats_itself() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 8, 380) for _ in range(2))
    assert first == second
    assert Vocabulary.from_dict(json.loads(first)).num_codes == 8


def test_whole_words_become_one_token_each(tmp_path: Path) -> None:
    names, path = ["quokka", "빨간 사과", "red quokka"], tmp_path / "tokenizer.json"
    counts = []
    for full in ((), names):
        path.write_text(train_tokenizer(TEXTS, 8, 420, full), encoding="utf-8")
        processor = Processor(path, ImageLayout(2, 2))
        assert processor.vocabulary.size <= 420
        tokens = [processor.encode_text(name) for name in names]
        assert [processor.decode_text(ids) for ids in tokens] == names
        asked = processor.encode_text("A quokka! quokkas, 사과를")
        assert processor.decode_text(asked) == "A quokka! quokkas, 사과를"
        counts.append([len(ids) for ids in tokens])
    assert counts[1] == [1, 2, 2] and counts[0] > counts[1]
    before = json.loads(train_tokenizer(TEXTS, 8, 420, names))["model"]
    assert sorted(before["vocab"].values()) == list(range(len(before["vocab"])))
    room = len(control_and_image_names(8)) + 256 + 2
    assert Vocabulary.from_dict(json.loads(train_tokenizer([], 8, room, names))).size <= room


def test_training_errors() -> None:
    smallest = len(control_and_image_names(8)) + 256
    assert Vocabulary.from_dict(json.loads(train_tokenizer([], 8, smallest))).size == smallest
    with pytest.raises(SettingError, match=f"vocab_size={smallest - 1} is too small"):
        train_tokenizer(TEXTS, 8, smallest - 1)
    with pytest.raises(DataError, match="lone surrogate"):
        train_tokenizer(["a\ud800"], 8, 400)
