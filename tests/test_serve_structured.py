"""The formats of `response_format` and `text.format`, asked for by OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel
from serve_case import Running, events, mini, running

FRUIT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["apple", "pear"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
ASK: Any = [{"role": "user", "content": "Name a fruit."}]
NAMED = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": FRUIT, "strict": True}}


class Fruit(BaseModel):
    name: Literal["apple", "pear"]
    count: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chats_whole_and_streamed_are_the_python_api_s(server: Running) -> None:
    fields = {"seed": 3, "temperature": 1, "max_tokens": 60, "response_format": NAMED}
    expected = mini().generate(
        "Name a fruit.", "auto", seed=3, temperature=1, max_tokens=60, json_schema=FRUIT
    )
    jsonschema_rs.validate(FRUIT, json.loads(expected.text))
    [choice] = server.chat("Name a fruit.", **fields).json()["choices"]
    chunks = events(server.chat("Name a fruit.", stream=True, **fields).text)
    deltas = [d["choices"][0]["delta"].get("content", "") for _, d in chunks if d != "[DONE]"]
    assert choice["message"]["content"] == "".join(deltas) == expected.text


def test_the_client_parses_its_own_classes(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="mini", messages=ASK, response_format=Fruit, seed=1, max_tokens=60
    )
    fruit = parsed.choices[0].message.parsed
    assert fruit is not None and fruit.name in ("apple", "pear")
    response = client.responses.parse(
        model="mini", input="Name a fruit.", text_format=Fruit, max_output_tokens=60
    )
    assert response.output_parsed is not None and response.output_parsed.name in ("apple", "pear")
    assert response.text is not None and response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize(
    ("form", "expression"),
    [
        ({"type": "regex", "pattern": "[a-c]{3}"}, "[a-c]{3}"),
        ({"type": "grammar", "grammar": 'start: "a" /[0-9]{2}/'}, "a[0-9]{2}"),
        ({"type": "text"}, ".*"),
    ],
)
def test_every_route_with_text_takes_every_format(
    server: Running, form: dict[str, Any], expression: str
) -> None:
    common = {"seed": 0, "temperature": 1}
    chat = server.chat("Hi", modalities=["text"], response_format=form, max_tokens=9, **common)
    assert re.fullmatch(expression, chat.json()["choices"][0]["message"]["content"])
    body = {"prompt": "Hi", "response_format": form, "max_tokens": 9, **common}
    completion = server.post("/v1/completions", body)
    assert re.fullmatch(expression, completion.json()["choices"][0]["text"].strip())
    body = {"input": "Hi", "text": {"format": form}, "max_output_tokens": 9, **common}
    response = server.post("/v1/responses", body).json()
    assert re.fullmatch(expression, response["output"][0]["content"][0]["text"])
    assert response["text"]["format"] == form


def test_an_image_stands_in_the_slot_of_a_grammar(server: Running) -> None:
    form = {"type": "grammar", "grammar": 'start: "Here: " <image> "That is " /[a-z]{3}/ "."'}
    reply = server.chat("Draw a red apple.", response_format=form, seed=1)
    message = reply.json()["choices"][0]["message"]
    kinds = [part["type"] for part in message["parts"]]
    assert kinds == ["text", "image_ref", "text"]
    assert re.fullmatch(r"Here:\nThat is [a-z]{3}\.", message["content"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "fruit"}}},
            "json_schema is not possible: Invalid type: fruit; correct it",
        ),
        ({"type": "regex", "pattern": "(a"}, "regex is not possible: unclosed group; correct it"),
        ({"type": "grammar", "grammar": "x"}, "grammar is not possible: "),
    ],
)
def test_a_format_that_is_not_valid_is_a_400_with_one_sentence(
    server: Running, form: dict[str, Any], sentence: str, stream: bool
) -> None:
    reply = server.chat("Hi", response_format=form, stream=stream)
    message = reply.json()["error"]["message"]
    assert reply.status_code == 400 and message.startswith(sentence) and "\n" not in message


def test_images_alone_cannot_have_a_format(server: Running) -> None:
    form = {"type": "json_object"}
    reply = server.chat("Draw a cat.", modalities=["image"], response_format=form)
    assert reply.status_code == 400 and "this reply can have none" in reply.text
