"""Text that fits a JSON schema, a regular expression or a grammar, in reference loop and engine."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from serve_case import mini
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion import Chameleon, Image, ImageDone, Reply, SamplingParams, SettingError, Text
from earlyfusion.engine.sampling import TokenSampler
from earlyfusion.generation import constraint
from earlyfusion.generation.reference import generate, generate_tokens

FRUIT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "colour": {"enum": ["red", "green", "yellow"]},
        "seeds": {"type": "integer", "minimum": 0, "maximum": 1000},
        "ripe": {"type": "boolean"},
    },
    "required": ["name", "colour", "seeds"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    FRUIT,
    {"type": "array", "items": {"$ref": "#/$defs/fruit"}, "minItems": 2, "maxItems": 3}
    | {"$defs": {"fruit": FRUIT}},
    {"anyOf": [{"type": "null"}, {"type": "integer", "exclusiveMinimum": 3, "maximum": 99}]},
    {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{2}$"},
    {
        "type": "object",
        "properties": {"kind": {"const": "과일"}, "at": {"type": "string", "format": "date"}},
        "required": ["kind", "at"],
        "additionalProperties": False,
    },
]
REGEXES = [
    r"[a-c]{3,5}",
    r"(apple|pear|사과), [0-9]{1,3}",
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",  # llguidance knows digits (\d) that are newer than Python's
    r"(yes|no)",
    r"[^a-zA-Z\n ]{1,6}",
]


# So long that it would overflow the library's stack.
CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2999)) + 'r2999: "a"'


def is_arithmetic(text: str) -> bool:
    tree = ast.parse(text, mode="eval").body
    kinds = (ast.BinOp, ast.Constant, ast.Add, ast.Mult)
    return all(isinstance(node, kinds) for node in ast.walk(tree)) and " " not in text


def is_list(text: str) -> bool:
    lines = text.split("\n")
    return 1 <= len(lines) <= 3 and all(re.fullmatch(r"- [a-z]{1,8}", line) for line in lines)


GRAMMARS: list[tuple[str, Callable[[str], bool]]] = [
    (
        """start: sum
sum: product | product "+" product
product: atom | atom "*" atom
atom: NUMBER | "(" NUMBER "+" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/""",
        is_arithmetic,
    ),
    ("start: item{1,3}\nitem: /- [a-z]{1,8}\\n/", is_list),
    (
        'start: "I like " FRUIT " and " FRUIT "."\nFRUIT: "apples" | "pears"',
        lambda text: bool(re.fullmatch(r"I like (apples|pears) and (apples|pears)\.", text)),
    ),
]


def sampled_texts(count: int, **fields: Any) -> list[str]:
    prompts = ["Name a fruit.", "What is this?", "Draw a cat.", "Hi"]
    replies = mini().generate_batch(
        [prompts[i % 4] for i in range(count)], "text", temperature=1, seed=0, top_p=1, **fields
    )
    assert {reply.finish_reason for reply in replies} == {"stop"}
    texts = [reply.text for reply in replies]
    assert len(set(texts)) > 1
    return texts


MANY = pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])


@MANY
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_text_sampled_at_random_validates(number: int, count: int) -> None:
    schema = SCHEMAS[number]
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for text in sampled_texts(count, json_schema=schema):
        validator.validate(json.loads(text))


@MANY
@pytest.mark.parametrize("regex", REGEXES)
def test_text_sampled_at_random_matches(regex: str, count: int) -> None:
    assert all(re.fullmatch(regex, text) for text in sampled_texts(count, regex=regex))


@MANY
@pytest.mark.parametrize("number", range(len(GRAMMARS)))
def test_text_sampled_at_random_is_in_the_grammar(number: int, count: int) -> None:
    grammar, fits = GRAMMARS[number]
    assert all(fits(text) for text in sampled_texts(count, grammar=grammar))


def test_a_schema_that_allows_any_object_gives_json() -> None:
    replies = mini().generate_batch(
        ["Hi"] * 20, "text", temperature=1, seed=0, max_tokens=900, json_schema={"type": "object"}
    )
    complete = [json.loads(reply.text) for reply in replies if reply.finish_reason == "stop"]
    assert len(complete) >= 4 and all(isinstance(value, dict) for value in complete)


# --- images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Chameleon:
    """Prefers images; its images are not decoded here."""
    processor = tiny_processor(tmp_path_factory.mktemp("tiny"))
    model = mini()
    return Chameleon(tiny_transformer(processor, begin_image=3.0), model.image_tokenizer, processor)


def segments(model: Chameleon, seed: int, **fields: Any) -> list[Any]:
    """The segments by the engine, which are those of the reference loop."""
    request = model.request("a pear", "interleaved", seed=seed, temperature=1.5, **fields)
    replies = []
    for events in (model.engine.generate(request), generate(*_parts(model), request)):
        text, parts = "", list[Any]()
        for event in events:
            if isinstance(event, ImageDone):
                parts += [text, event.codes.tolist()]
                text = ""
            text += getattr(event, "text", "")
        replies.append([*parts, text])
    assert replies[0] == replies[1]
    return [part for part in replies[0] if part != ""]


def _parts(model: Chameleon) -> tuple[Any, Any]:
    return model.transformer, model.processor


def test_images_stand_before_or_after_the_one_text(random_model: Chameleon) -> None:
    orders = set()
    for seed in range(30):
        parts = segments(random_model, seed, regex="[a-c]{2,6}", max_images=2, max_tokens=200)
        [text] = [part for part in parts if isinstance(part, str)]
        assert re.fullmatch("[a-c]{2,6}", text)
        orders.add(tuple(isinstance(part, str) for part in parts))
    assert {(True,), (True, False), (False, True)} <= orders


FORBIDDING: list[dict[str, Any]] = [
    {"regex": "[a-c]{2,6} ?(pear|cat)?"},
    {"json_schema": {"enum": ["a", "ab", 12, None]}, "repetition_penalty": 1.4},
    {"bad_words": ["e", "ar"], "top_p": 0.8, "repetition_penalty": 1.2},
    {"allowed_words": ["a", "pear", "bee"], "top_k": 5},
    {"regex": "[a-z ]{1,9}", "bad_words": ["a"], "guidance_text": 2.0, "guidance_image": 1.3},
    {"grammar": 'start: /[a-d]{1,4}/ "."'},
    {"temperature": 0, "regex": "[a-f]{8}"},
    {},
]


@MANY
@pytest.mark.parametrize("compiled", [True, False])
def test_a_mask_in_a_batch_gives_the_tokens_of_the_plain_loop(
    random_model: Chameleon, compiled: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = random_model.engine
    if not compiled:
        monkeypatch.setattr(engine.runner.backend, "sample", None)
    elif engine.runner.backend.sample is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(TokenSampler, "_sample_steered", None)  # none of them is sampled separately
    requests = [
        random_model.request(
            "a pear",
            "interleaved" if seed % 3 else "text",
            seed=seed,
            max_tokens=40,
            **{"temperature": 1.2} | FORBIDDING[seed % len(FORBIDDING)],
        )
        for seed in range(count)
    ]
    handles = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    for request, handle in zip(requests, handles, strict=True):
        assert handle.error is None
        assert handle.tokens == list(generate_tokens(*_parts(random_model), request))


def test_tokens_allowed_around_an_image(random_model: Chameleon) -> None:
    processor = random_model.processor
    vocabulary = processor.vocabulary
    request = random_model.request("a pear", "interleaved", seed=0, regex="[a-c]{2,6}")
    image = processor.layout.spell(np.zeros((8, 8), int), vocabulary)
    letters = [processor.encode_text(letter)[0] for letter in "abc"]
    marks = {vocabulary.begin_image: "image", vocabulary.eos: "end"}

    def next_ones(*reply: int) -> set[str]:
        follows = constraint.constraint(processor, request)
        assert follows is not None
        logits_V = follows([*request.ids, *reply], torch.zeros(CONFIG.vocab_size))
        allowed = logits_V.isfinite().nonzero()[:, 0].tolist()
        return {marks.get(token, "text") for token in allowed}

    assert next_ones() == {"image", "text"}
    assert next_ones(*image) == {"text"}, "not two before the text"
    assert next_ones(letters[0]) == {"text"}
    assert next_ones(*image, *letters) == {"image", "text", "end"}
    assert next_ones(*letters, *image) == {"image", "end"}
    assert next_ones(*letters, *image, *image) == {"image", "end"}


def test_a_grammar_says_where_an_image_stands(random_model: Chameleon) -> None:
    grammar = 'start: "see " <image> " or " <image> /[ab]{1,3}/'
    for seed in range(3):
        first, one, second, two, last = segments(
            random_model, seed, grammar=grammar, max_images=2, max_tokens=200
        )
        assert (first, second) == ("see ", " or ") and re.fullmatch("[ab]{1,3}", last)
        assert np.shape(one) == np.shape(two) == (8, 8)


def test_an_image_of_mini_stands_where_the_grammar_says() -> None:
    reply = mini().generate(
        "Draw a red apple.", seed=1, grammar='start: "Here: " <image> "That is " /[a-z]{3}/ "."'
    )
    first, image, last = reply.segments
    assert isinstance(first, Text) and isinstance(image, Image) and isinstance(last, Text)
    assert first.text == "Here:" and re.fullmatch(r"That is [a-z]{3}\.", last.text)
    assert reply.finish_reason == "stop"


# --- mistakes, neighbours --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"regex": "(a"}, "regex is not possible: unclosed group; correct it"),
        ({"regex": ""}, "regex='' is not possible: use a text"),
        ({"regex": 5}, "regex=5 is not possible"),
        ({"regex": "a" * 100_001}, "regex has 100,001 characters, limit 100,000"),
        ({"json_schema": {"type": "fruit"}}, "json_schema is not possible: Invalid type: fruit"),
        ({"json_schema": {"not": {}}}, "json_schema is not possible: Unimplemented keys"),
        ({"json_schema": "["}, "use a JSON schema that is an object"),
        ({"json_schema": [1]}, "use a JSON schema that is an object"),
        ({"json_schema": {"a": {1, 2}}}, "use a JSON schema that is an object"),
        ({"json_schema": {"enum": []}}, "json_schema is not possible"),
        ({"grammar": "start: fruit"}, 'grammar is not possible: .*unknown name: "fruit"'),
        ({"grammar": "start: <racm3:break>"}, "grammar is not possible: .*unknown special token"),
        ({"json_schema": {"type": "integer", "maximum": 10**300}}, "not JSON serializable"),
        ({"grammar": CHAIN}, "grammar has 3,001 colons, limit 1,000: make it smaller"),
        ({"json_schema": {"items": [{"$ref": "#"}] * 501}}, "has 501 references, limit 500"),
        ({"regex": "(" * 3000 + ")" * 3000}, "regex is not possible: exceed the maximum number"),
        ({"grammar": 'start: "a"', "regex": "a"}, "regex and grammar both say what text may be"),
        ({"regex": "a", "allowed_words": ["a"]}, "regex and allowed_words both say"),
        ({"regex": "a", "jacobi": 4}, "which regex cannot follow"),
        ({"grammar": 'start: "a" <image>'}, "grammar left no possible token after"),
        ({"regex": "apple", "bad_words": ["pp"]}, "regex left no possible token after"),
    ],
)
def test_what_cannot_be_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence) as error:
        mini().generate("Name a fruit.", "text", **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_reply_of_images_alone_cannot_be_constrained() -> None:
    with pytest.raises(SettingError, match="regex is for text, and this reply can have none"):
        mini().generate("Draw a cat.", "image", regex="a")


def test_a_schema_is_kept_as_json() -> None:
    assert SamplingParams(json_schema={"type": "object"}).json_schema == '{"type": "object"}'
    assert SamplingParams(json_schema='{"type":  "object"}').json_schema == '{"type": "object"}'


def test_neighbours_are_not_changed() -> None:
    def answers(**fields: Any) -> Reply:
        return mini().generate("Name a fruit.", "text", seed=4, temperature=1, **fields)

    one, other = SamplingParams(temperature=1), SamplingParams(temperature=1, regex="[a-c]{3}")
    replies = mini().generate_batch(["Name a fruit."] * 4, "text", [one, other] * 2, seed=[4] * 4)
    alone = [answers().text, answers(regex="[a-c]{3}").text] * 2
    assert [reply.text for reply in replies] == alone


def test_compiled_texts_are_kept_and_bounded(tmp_path: Path) -> None:
    processor = tiny_processor(tmp_path)
    for number in range(100):
        constraint.check(processor, SamplingParams(regex=f"a{{{number + 1}}}"))
    compiler = constraint._compilers._by_processor[processor]
    assert len(compiler._matchers) == 64
    for _ in range(2):
        constraint.check(processor, SamplingParams(regex="a{100}"))
    assert len(compiler._matchers) == 64


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SettingError, match=r"pip install 'earlyfusion\[structured\]'"):
        constraint.check(tiny_processor(tmp_path), SamplingParams(regex="a"))
