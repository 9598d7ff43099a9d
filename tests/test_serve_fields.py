"""Every field of every route changes the reply, or is documented to be accepted without effect."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_case import STRAWBERRY, Running, data_url, events, running

from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EditRequest,
    GenerationRequest,
    ImageSampling,
    ResponseRequest,
    StrictModel,
    TextSampling,
    TokenizeRequest,
    VariationRequest,
    read,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "serve.md"
WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Their effect cannot be seen in a reply of mini; other values than the possible ones are refused.
REFUSED = {
    "prompt_lookup",  # changes the time only
    "size",  # mini has one
    "previous_response_id",  # of an earlier response; test_serve_api.py follows one
    "max_images of /v1/completions",  # no image can come
    "stream_options of /v1/responses",
    "guidance_image of /v1/images/generations",  # no image in the prompt
}

TEXT = {"temperature": 1.5, "seed": 0, "max_tokens": 8}
DRAW = {"seed": 0, "image_temperature": 1.0, "image_top_p": 1.0}
FRUIT = [{"role": "user", "content": "Name a fruit."}]
CAT = [{"role": "user", "content": "Draw a cat."}]
EDIT = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url()}},
            {"type": "text", "text": "Draw it in another style."},
        ],
    }
]
Change = tuple[dict[str, Any], dict[str, Any]]


def text_fields(base: dict[str, Any], limit: str = "max_tokens") -> dict[str, Change]:
    base = base | {k: v for k, v in TEXT.items() if k != "max_tokens"} | {limit: 8}
    return {
        "temperature": (base, {"temperature": 0}),
        "top_p": (base, {"top_p": 0.01}),
        "top_k": (base, {"top_k": 1}),
        "min_p": (base, {"min_p": 1}),
        "repetition_penalty": (base | {"temperature": 0}, {"repetition_penalty": 0.01}),
        "seed": (base, {"seed": 5}),
        "stop": (base | {"temperature": 0}, {"stop": "e"}),
        "bad_words": (base | {"temperature": 0}, {"bad_words": ["a", "e"]}),
        "allowed_words": (base | {"temperature": 0}, {"allowed_words": ["zebra"]}),
        # It changes no token; wrong values are refused all the same.
        "prompt_lookup": (base, {"prompt_lookup": -1}),
        limit: (base | {"temperature": 0}, {limit: 1}),
    }


def image_fields(generation: dict[str, Any], edit: dict[str, Any]) -> dict[str, Change]:
    """`edit` has an image in its prompt, which alone `guidance_image` pulls by."""
    generation, edit = generation | DRAW, edit | DRAW
    return {
        "image_temperature": (generation, {"image_temperature": 0}),
        "image_top_p": (generation, {"image_top_p": 0.01}),
        "image_top_k": (generation, {"image_top_k": 1}),
        "guidance_text": (generation, {"guidance_text": 5}),
        "guidance_image": (edit, {"guidance_image": 5}),
        "jacobi": (generation, {"jacobi": 3}),
        "negative_prompt": (
            edit | {"guidance_text": 3, "guidance_image": 2},
            {"negative_prompt": "Draw a cat."},
        ),
    }


def image_item_fields(base: dict[str, Any]) -> dict[str, Change]:
    stream = base | {"seed": 0, "stream": True}
    fields = base | {"seed": 0}
    return {
        "prompt": (fields, {"prompt": "Draw a dog."}),
        "n": (fields, {"n": 2}),
        "size": (fields, {"size": "32x32"}),
        "response_format": (fields, {"response_format": "url"}),
        "output_format": (fields, {"output_format": "webp"}),
        "output_compression": (fields | {"output_format": "jpeg"}, {"output_compression": 5}),
        "stream": (fields, {"stream": True}),
        "partial_images": (stream, {"partial_images": 1}),
        "seed": (fields, {"seed": 1}),
        **image_fields(base, base),
    }


FRUIT_TEXT = {"messages": FRUIT, "modalities": ["text"]}
CHAT: dict[str, Change] = {
    **text_fields(FRUIT_TEXT),
    **image_fields(
        {"messages": CAT, "modalities": ["image"]}, {"messages": EDIT, "modalities": ["image"]}
    ),
    "messages": ({"messages": FRUIT} | TEXT, {"messages": [{"role": "user", "content": "Hi"}]}),
    "modalities": ({"messages": FRUIT} | TEXT, {"modalities": ["image"], "max_tokens": 80}),
    "max_completion_tokens": (FRUIT_TEXT | {"temperature": 0}, {"max_completion_tokens": 1}),
    "n": (FRUIT_TEXT | TEXT, {"n": 2}),
    "stream": (FRUIT_TEXT | TEXT, {"stream": True}),
    "stream_options": (
        FRUIT_TEXT | TEXT | {"stream": True},
        {"stream_options": {"include_usage": True}},
    ),
    "logprobs": (FRUIT_TEXT | TEXT, {"logprobs": True}),
    "top_logprobs": (FRUIT_TEXT | TEXT | {"logprobs": True}, {"top_logprobs": 1}),
    "max_images": ({"messages": CAT, "seed": 0}, {"max_images": 0, "max_tokens": 8}),
    "response_format": (FRUIT_TEXT | TEXT, {"response_format": {"type": "regex", "pattern": "a+"}}),
    "image_delivery": ({"messages": CAT} | DRAW, {"image_delivery": "markdown"}),
    "output_format": ({"messages": CAT} | DRAW, {"output_format": "webp"}),
    "output_compression": (
        {"messages": CAT, "output_format": "jpeg"} | DRAW,
        {"output_compression": 5},
    ),
    "partial_images": ({"messages": CAT, "stream": True} | DRAW, {"partial_images": 1}),
}
FRUIT_PROMPT = {"prompt": "Name a fruit."}
COMPLETION: dict[str, Change] = {
    **text_fields(FRUIT_PROMPT),
    "prompt": (FRUIT_PROMPT | TEXT, {"prompt": "Hi"}),
    "n": (FRUIT_PROMPT | TEXT, {"n": 2}),
    "stream": (FRUIT_PROMPT | TEXT, {"stream": True}),
    "stream_options": (
        FRUIT_PROMPT | TEXT | {"stream": True},
        {"stream_options": {"include_usage": True}},
    ),
    "logprobs": (FRUIT_PROMPT | TEXT, {"logprobs": 1}),
    "max_images": (FRUIT_PROMPT | TEXT, {"max_images": 1}),
    "response_format": (FRUIT_PROMPT | TEXT, {"response_format": {"type": "json_object"}}),
}
TOOL = [{"type": "image_generation"}]
FRUIT_INPUT = {"input": "Name a fruit."}
CAT_INPUT = {"input": "Draw a cat.", "tools": TOOL}
EDIT_INPUT = {
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url()},
                {"type": "input_text", "text": "Draw it in another style."},
            ],
        }
    ],
    "tools": TOOL,
    "tool_choice": "required",
}
RESPONSE: dict[str, Change] = {
    **text_fields(FRUIT_INPUT, "max_output_tokens"),
    **image_fields(CAT_INPUT, EDIT_INPUT),
    "input": (FRUIT_INPUT | {"temperature": 0}, {"input": "Name an animal."}),
    "instructions": (FRUIT_INPUT | {"temperature": 0}, {"instructions": "Draw, or say nothing."}),
    "previous_response_id": (FRUIT_INPUT, {"previous_response_id": "resp_none"}),
    "store": (FRUIT_INPUT | {"temperature": 0}, {"store": False}),
    "stream": (FRUIT_INPUT | {"temperature": 0}, {"stream": True}),
    "tools": ({"input": "Draw a cat.", "temperature": 0, "seed": 0}, {"tools": TOOL}),
    "tool_choice": (
        FRUIT_INPUT | {"tools": TOOL, "seed": 0},
        {"tool_choice": "required"},
    ),
    "text": (FRUIT_INPUT | {"temperature": 0}, {"text": {"format": {"type": "json_object"}}}),
    "top_logprobs": (FRUIT_INPUT | {"temperature": 0}, {"top_logprobs": 1}),
    "include": (FRUIT_INPUT | {"temperature": 0}, {"include": ["message.output_text.logprobs"]}),
    "max_images": (CAT_INPUT | {"seed": 0}, {"max_images": 0, "max_output_tokens": 8}),
    "stream_options": (
        FRUIT_INPUT | {"stream": True, "temperature": 0},
        {"stream_options": {"include_obfuscation": True}},
    ),
}
WORDS = {"prompt": "Hi"}
GENERATION = image_item_fields({"prompt": "Draw a cat."})
GENERATION["guidance_image"] = (GENERATION["n"][0], {"guidance_image": 5})
GENERATION["negative_prompt"] = (
    GENERATION["jacobi"][0] | {"guidance_text": 3},
    {"negative_prompt": "Draw a green apple."},
)
ROUTES: dict[str, tuple[type[StrictModel], dict[str, Change]]] = {
    "/v1/chat/completions": (ChatRequest, CHAT),
    "/v1/completions": (CompletionRequest, COMPLETION),
    "/v1/responses": (ResponseRequest, RESPONSE),
    "/v1/images/generations": (GenerationRequest, GENERATION),
    "/v1/images/edits": (
        EditRequest,
        image_item_fields({"prompt": "Draw it again.", "images": [{"image_url": data_url()}]})
        | {
            "images": (
                {"prompt": "Draw it.", "seed": 0, "images": [{"image_url": data_url()}]},
                {"images": [{"image_url": data_url()}] * 2},
            )
        },
    ),
    "/v1/images/variations": (VariationRequest, image_item_fields({})),
    "/tokenize": (
        TokenizeRequest,
        {
            "prompt": (WORDS, {"prompt": "Ho"}),
            "messages": (WORDS, {"prompt": None, "messages": FRUIT}),
            "return_token_strs": (WORDS, {"return_token_strs": True}),
        },
    ),
    "/detokenize": (DetokenizeRequest, {"tokens": ({"tokens": [1071, 1104]}, {"tokens": [1096]})}),
}
CASES = [(path, name) for path, (_, table) in ROUTES.items() for name in table]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def ask(server: Running, path: str, body: dict[str, Any]) -> Any:
    """The status and the reply, without what is new each time."""
    if path.endswith("variations"):
        fields = {name: str(value).lower() for name, value in body.items()}
        with httpx.Client(timeout=120) as client:
            files = {"image": STRAWBERRY.read_bytes()}
            reply = client.post(server.url + path, data=fields, files=files)
    else:
        reply = server.post(path, body)
    text = reply.text
    is_stream = text.startswith(("data", "event"))
    content = [data for _, data in events(text)] if is_stream else reply.json()
    return reply.status_code, steady(content)


def steady(data: Any) -> Any:
    if isinstance(data, list):
        return [steady(one) for one in data]
    if isinstance(data, dict):
        new = {"id", "created", "created_at", "item_id", "metadata", "user"}
        return {name: steady(value) for name, value in data.items() if name not in new}
    return re.sub(r"file-\S+", "file", data) if isinstance(data, str) else data


@pytest.mark.parametrize("path", ROUTES)
def test_the_tables_name_every_field(path: str) -> None:
    kind, table = ROUTES[path]
    without = WITHOUT_EFFECT if "/v1" in path else set()
    assert set(table) | {"model"} | without == set(kind.model_fields)


OPENAI = openai.OpenAI(base_url="http://127.0.0.1", api_key="none")
SDK: dict[str, tuple[Callable[..., Any], ...]] = {
    "/v1/chat/completions": (OPENAI.chat.completions.create, OPENAI.chat.completions.parse),
    "/v1/completions": (OPENAI.completions.create,),
    "/v1/responses": (OPENAI.responses.create, OPENAI.responses.parse),
    "/v1/images/generations": (OPENAI.images.generate,),
    "/v1/images/edits": (OPENAI.images.edit,),
    "/v1/images/variations": (OPENAI.images.create_variation,),
}


def test_defaults_of_the_sdk_s_parameters_change_nothing() -> None:
    defaults = {"verbosity": "medium", "prompt_cache_retention": "in_memory"}
    for kind, body in ((ChatRequest, FRUIT_TEXT), (ResponseRequest, FRUIT_INPUT)):
        assert read(kind, body | defaults)[0] == read(kind, body)[0]


@pytest.mark.parametrize("path", SDK)
def test_every_parameter_of_the_sdk_is_known(path: str) -> None:
    kind = ROUTES[path][0]
    # The client's own, a file of a form, and what `parse` makes a format of.
    client_only = {
        "extra_headers",
        "extra_query",
        "extra_body",
        "timeout",
        "text_format",
        "parse_as",
    }
    client_only |= {"image"} if path.endswith(("edits", "variations")) else set()
    names = {
        name for method in SDK[path] for name in inspect.signature(method).parameters
    } - client_only
    assert names - set(kind.model_fields) - set(kind.neutral) - set(kind.why_not) == set()
    # Both values of this one change nothing; any other is refused with a reason of its own.
    refused = names - set(kind.model_fields) - {"parallel_tool_calls"}
    for name in sorted(refused):
        body = ROUTES[path][1]["seed"][0] | {name: "no such value"}
        with pytest.raises(ApiError) as error:
            read(kind, body)
        assert error.value.param == name and error.value.message.startswith(f"{name}: ")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_field_changes_the_reply(server: Running, path: str, name: str) -> None:
    base, change = ROUTES[path][1][name]
    status, reply = ask(server, path, base)
    assert status == 200, reply
    status, changed = ask(server, path, base | change)
    if REFUSED & {name, f"{name} of {path}"}:
        error = changed["error"]
        assert status in (400, 404) and name in f"{error['param']} {error['message']}"
    else:
        assert status == 200 and changed != reply


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/images/generations"])
def test_a_field_of_the_other_modality_is_refused(path: str) -> None:
    kind, table = ROUTES[path]
    other = ImageSampling if path == "/v1/completions" else TextSampling
    for name in set(other.model_fields) - set(kind.model_fields):
        with pytest.raises(ApiError) as error:
            read(kind, table["seed"][0] | {name: 1})
        assert error.value.param == name and "generates" in error.value.message
    assert read(CompletionRequest, FRUIT_PROMPT | {"jacobi": 4}, lenient=True)[1] == ["jacobi"]


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb", "<b>", "<b"])
def test_a_field_of_any_name_is_named(name: str) -> None:
    message = {"role": "user", "content": "Hi"}
    for body in ({"messages": [message], name: 1}, {"messages": [message | {name: 1}]}):
        with pytest.raises(ApiError) as error:
            read(ChatRequest, body)
        assert error.value.code == "unknown_field" and repr(name) in error.value.message
        assert repr(name) in str(error.value.param)
        assert repr(name) in read(ChatRequest, body, lenient=True)[1][0]


@pytest.mark.slow
def test_a_model_that_is_not_served_is_refused(server: Running) -> None:
    for path, (_, table) in ROUTES.items():
        base, _ = next(iter(table.values()))
        assert ask(server, path, base | {"model": "other"})[0] == 404


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in ROUTES if "/v1" in path])
def test_what_has_no_effect_is_documented(server: Running, path: str) -> None:
    base, _ = next(iter(ROUTES[path][1].values()))
    extra: dict[str, Any] = dict.fromkeys(WITHOUT_EFFECT - {"metadata"}, "x")
    if not path.endswith("variations"):  # a form holds no objects
        extra["metadata"] = {"a": "b"}
    assert ask(server, path, base | extra) == ask(server, path, base)
    page = DOCUMENT.read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if "accepted without effect" in line]
    assert all(f"`{name}`" in row for name in WITHOUT_EFFECT)


def test_the_page_s_python_runs(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(tmp_path)
    captured_request: dict[str, Any] = {}
    exec(
        compile(block.replace("http://127.0.0.1:8000", server.url), "docs/serve.md", "exec"),
        captured_request,
    )
    captured_request["client"].close()
    assert (tmp_path / "apple.png").read_bytes()[:4] == b"\x89PNG"
    assert "response.completed" in capsys.readouterr().out


def test_the_page_names_every_route(server: Running) -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    for path in server.get("/openapi.json").json()["paths"]:
        assert path.removeprefix("/v1/images").split("/{")[0] in page
