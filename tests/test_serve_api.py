"""OpenAI's own Python SDK against a running server."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import PIL.Image
import pytest
from serve_case import STRAWBERRY, Running, answer, data_url, events, mini, pixels, running

from earlyfusion import Chameleon, Finished, Image, ImageDone, Message, Text, TextDelta

FRUITS = "Show me two different fruits."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def model() -> Chameleon:
    return mini()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts[0] if len(parts) == 1 else list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def same(image_a: Any, image_b: Any) -> bool:
    return bool(image_a.tobytes() == image_b.tobytes())


# --- chat ---


def test_usage_counts_tokens_that_the_cache_held(client: openai.OpenAI, server: Running) -> None:
    prompt: Any = user(image(data_url()), text("What is this, and where was it counted?"))

    def usage(n: int = 1) -> Any:
        reply = client.chat.completions.create(
            model="mini", messages=prompt, modalities=["text"], max_tokens=2, n=n
        )
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        return reply.usage

    first, second, third = usage(), usage(), usage(n=2)
    tokens = first.prompt_tokens
    assert first.prompt_tokens_details.cached_tokens < tokens - 1
    # All but the last token, whose logits are needed.
    assert second.prompt_tokens_details.cached_tokens == tokens - 1
    assert third.prompt_tokens_details.cached_tokens == tokens - 1
    assert third.prompt_tokens == tokens
    prompt = user("Do tokens count as cached that only the other choice has read? " * 5)
    two = usage(n=2)
    assert two.prompt_tokens_details.cached_tokens < two.prompt_tokens - 1
    reply = client.responses.create(model="mini", input="Was it counted here?", max_output_tokens=1)
    again = client.responses.create(model="mini", input="Was it counted here?", max_output_tokens=1)
    assert reply.usage is not None and again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == reply.usage.input_tokens - 1
    texts = ["Was it counted, too?", "And was this one?", "And was this one?"]
    asked: Any = {"model": "mini", "prompt": texts, "max_tokens": 1, "n": 2}
    client.completions.create(**asked)
    whole = client.completions.create(**asked).usage
    *_, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for read in (whole, last.usage):
        assert read is not None and read.prompt_tokens_details is not None
        assert read.prompt_tokens_details.cached_tokens == read.prompt_tokens - 3
    counted = httpx.get(f"{server.url}/metrics").text
    hits = re.search(r"prefix_cache_hits_total{.*} (\d+)", counted)
    assert hits is not None and float(hits[1]) >= 3 * tokens


def test_an_image_in(client: openai.OpenAI, model: Chameleon) -> None:
    messages: Any = user(image(data_url()), text("What is this?"))
    reply = client.chat.completions.create(model="mini", messages=messages, max_tokens=12)
    expected = model.generate([Image.open(STRAWBERRY), "What is this?"], max_tokens=12)
    assert reply.choices[0].message.content == expected.text == "strawberry"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens == expected.usage.prompt_tokens
    assert reply.usage.prompt_tokens_details.image_tokens == 66
    assert reply.model_extra == {}


def test_images_and_words_keep_their_order_in_the_prompt(server: Running, model: Chameleon) -> None:
    strawberry = Image.open(STRAWBERRY)
    for parts, prompt in (
        ([text("A "), image(data_url()), text(" B")], ["A ", strawberry, " B"]),
        ([image(data_url()), text("A "), text("B")], [strawberry, "A ", "B"]),
    ):
        body = {"messages": user(*parts)}
        tokens = server.post("/tokenize", body).json()["tokens"]
        assert tokens == list(model.request(prompt, "text", seed=0).ids)


def test_an_image_out(client: openai.OpenAI, model: Chameleon) -> None:
    reply = client.chat.completions.create(
        model="mini",
        messages=user("Draw a red apple."),  # type: ignore[arg-type]
        seed=3,
        extra_body={"modalities": ["image"]},
    )
    expected = answer("Draw a red apple.", "image", 3)
    message = reply.choices[0].message.model_dump()
    assert message["content"] == ""
    assert message["parts"] == [{"type": "image_ref", "index": 0}]
    [part] = message["images"]
    assert (part["type"], part["index"]) == ("image_url", 0)
    assert same(pixels(part["image_url"]["url"]), expected.images[0])


def test_an_interleaved_reply_in_order(server: Running, model: Chameleon) -> None:
    expected = answer(FRUITS, "auto", 0)
    reply = server.chat(FRUITS, seed=0).json()
    message = reply["choices"][0]["message"]
    assert message["content"] == expected.text
    order = [part["type"] for part in message["parts"]]
    assert order == ["text", "image_ref", "text", "image_ref"]
    texts = [part["text"] for part in message["parts"] if part["type"] == "text"]
    assert texts == [s.text for s in expected.segments if isinstance(s, Text)]
    images = [pixels(one["image_url"]["url"]) for one in message["images"]]
    assert all(map(same, images, expected.images)) and len(images) == 2
    assert reply["usage"]["completion_tokens_details"]["image_tokens"] == 2 * 66
    assert reply["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert reply["choices"][0]["seed"] == expected.seed


def test_a_stream_is_the_reply_in_pieces(client: openai.OpenAI, model: Chameleon) -> None:
    expected = list(model.stream(FRUITS, seed=0))
    order, content, images, progress = [], "", [], []
    with client.chat.completions.create(
        model="mini",
        messages=user(FRUITS),  # type: ignore[arg-type]
        seed=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    for chunk in chunks[:-1]:
        delta = chunk.choices[0].delta.model_dump(exclude_none=True)
        content += delta.get("content", "")
        order += ["text"] * bool(delta.get("content")) + ["image"] * ("images" in delta)
        images += delta.get("images", [])
        progress += [delta["image_progress"]] if "image_progress" in delta else []
    expected_order = [
        "text" if isinstance(event, TextDelta) else "image"
        for event in expected
        if isinstance(event, TextDelta | ImageDone)
    ]
    assert order == expected_order
    assert content == answer(FRUITS, "auto", 0).text
    expected_images = [event.pil for event in expected if isinstance(event, ImageDone)]
    assert all(map(same, [pixels(part["image_url"]["url"]) for part in images], expected_images))
    assert progress[0] == {"index": 0, "codes_done": 8, "codes_total": 64}
    assert [part["codes_done"] for part in progress] == [8, 16, 24, 32, 40, 48, 56, 64] * 2
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert isinstance(expected[-1], Finished)
    assert chunks[-1].usage.total_tokens == expected[-1].usage.total_tokens


def test_partial_images_are_real_rows(server: Running, model: Chameleon) -> None:
    reply = server.chat(
        "Draw a red apple.", seed=0, modalities=["image"], stream=True, partial_images=3
    )
    deltas = [e["choices"][0]["delta"] for _, e in events(reply.text)[:-1]]
    partial = [d["image_progress"] for d in deltas if "b64_json" in d.get("image_progress", {})]
    [finished] = [pixels(d["images"][0]["image_url"]["url"]) for d in deltas if "images" in d]
    assert [p["codes_done"] for p in partial] == [16, 32, 48]
    for part in partial:
        preview, rows = pixels(part["b64_json"]), part["codes_done"] // 8
        assert preview.getpixel((5, 63)) == (128, 128, 128)  # grey: not generated yet
        assert not same(preview, finished)
        assert preview.getpixel((5, rows * 8 - 1)) != (128, 128, 128)


@pytest.mark.parametrize("delivery", ["markdown", "both"])
def test_markdown_images_come_back_as_their_codes(
    server: Running, model: Chameleon, delivery: str
) -> None:
    first = answer(FRUITS, "auto", 0)
    reply = server.chat(FRUITS, seed=0, image_delivery=delivery).json()
    message = reply["choices"][0]["message"]
    names = [s.text.strip() for s in first.segments if isinstance(s, Text)]
    assert message["content"].startswith(f"{names[0]}\n\n![image](http://127.0.0.1")
    assert ("images" in message) == (delivery == "both")
    streamed = server.chat(FRUITS, seed=0, image_delivery=delivery, stream=True).text
    deltas = [e["choices"][0]["delta"] for _, e in events(streamed)[:-1]]
    content = "".join(delta.get("content", "") for delta in deltas)
    blocks = [block.partition("(")[0] for block in content.split("\n\n")]
    assert blocks == [names[0], "![image]", names[1], "![image]"]

    sent = {key: message[key] for key in ("role", "content", "images") if key in message}
    messages = [*user(FRUITS), sent, *user("Draw the first one again.")]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    turns = [Message("user", FRUITS), first.message, Message("user", "Draw the first one again.")]
    assert tokens == list(model.request(turns, "text", seed=0).ids)


def test_images_and_parts_come_back_as_their_codes(server: Running, model: Chameleon) -> None:
    first = answer(FRUITS, "auto", 0)
    message = server.chat(FRUITS, seed=0).json()["choices"][0]["message"]
    del message["refusal"]
    messages = [*user(FRUITS), message, *user("Which is the second?")]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    turns = [Message("user", FRUITS), first.message, Message("user", "Which is the second?")]
    assert tokens == list(model.request(turns, "text", seed=0).ids)


def test_generated_images_in_a_user_turn_are_their_codes(server: Running, model: Chameleon) -> None:
    message = server.chat("Draw a cat.", seed=1, modalities=["image"]).json()["choices"][0][
        "message"
    ]
    url = message["images"][0]["image_url"]["url"]
    other = io.BytesIO()  # the same pixels as another program writes them
    pixels(url).save(other, "PNG", compress_level=0)
    file = base64.b64decode(url.partition(",")[2])
    written = other.getvalue()
    assert written != file
    with httpx.Client() as client:
        sent = client.post(f"{server.url}/v1/files", files={"file": file}).json()["id"]
    generated = answer("Draw a cat.", "image", 1).message.images[0]
    expected_ids = list(
        model.request([Message("user", [generated, "What is this?"])], "text", seed=0).ids
    )
    encoded = model.request([Message("user", [Image.of(file), "What is this?"])], "text", seed=0)
    assert list(encoded.ids) != expected_ids, "encoding again would lose something"
    parts = [
        image(url),
        image("data:image/png;base64," + base64.b64encode(written).decode()),
        {"type": "file", "file": {"file_id": sent}},
    ]
    for part in parts:
        body = {"messages": user(part, text("What is this?"))}
        assert server.post("/tokenize", body).json()["tokens"] == expected_ids
    words = "Draw it in another style."
    edited = server.post(
        "/v1/images/edits", {"prompt": words, "seed": 2, "images": [{"image_url": url}]}
    ).json()
    expected = model.generate([generated, words], "image", seed=2).images[0]
    assert same(pixels(edited["data"][0]["b64_json"]), expected)


def test_addresses_of_images_are_signed(server: Running) -> None:
    reply = server.chat("Draw a cat.", seed=0, modalities=["image"], image_delivery="markdown")
    address = reply.json()["choices"][0]["message"]["content"][len("![image](") : -1]
    path = address.removeprefix(server.url)
    response = server.get(path)
    assert response.headers["content-type"] == "image/png"
    assert pixels(response.content).size == (64, 64)
    messages = user(image(address), text("What is this?"))
    assert server.chat(messages, max_tokens=8).status_code == 200
    # A signature of another server, or of this one before its last start.
    stale = address[:-1] + "x"
    assistant_turn = {"role": "assistant", "content": f"![image]({stale})"}
    messages = user(image(stale), text("Is it big?"))
    for turns in (messages, [*user("Draw a cat."), assistant_turn, *user("Is it big?")]):
        error = server.chat(turns).json()["error"]
        assert error["code"] == "image_url_refused"
        assert "before it was started again: send the image itself" in error["message"]


def test_several_choices_have_seeds_of_their_own(server: Running, model: Chameleon) -> None:
    reply = server.chat("Name a fruit.", n=3, seed=5, temperature=2, max_tokens=6).json()
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert [choice["seed"] for choice in reply["choices"]] == [5, 6, 7]
    prompts = ["Name a fruit."] * 3
    expected = model.generate_batch(prompts, seed=5, temperature=2, max_tokens=6)
    assert texts == [one.text for one in expected]
    streamed = server.chat(
        "Name a fruit.", n=3, seed=5, temperature=2, max_tokens=6, stream=True
    ).text
    content = ["", "", ""]
    for _, data in events(streamed)[:-1]:
        choice = data["choices"][0]
        content[choice["index"]] += choice["delta"].get("content", "")
    assert content == texts


def test_seeds_that_the_server_chooses_are_exact_in_javascript(server: Running) -> None:
    seeds = []
    for _ in range(2):
        reply = server.chat("Name a fruit.", n=3, max_tokens=1, modalities=["text"]).json()
        seeds += [choice["seed"] for choice in reply["choices"]]
        reply = server.post("/v1/responses", {"input": "a", "max_output_tokens": 1}).json()
        seeds.append(reply["seed"])
    assert max(seeds) < 2**53 and len({*seeds}) == len(seeds) and max(seeds) > 2**32


def test_stop_and_length(server: Running) -> None:
    stopped = server.chat("Name a fruit.", stop=["e"], modalities=["text"]).json()["choices"][0]
    assert "e" not in stopped["message"]["content"] and stopped["finish_reason"] == "stop"
    short = server.chat("Name a fruit.", max_completion_tokens=1).json()["choices"][0]
    assert short["finish_reason"] == "length"


def test_logprobs_are_those_of_the_engine(server: Running, model: Chameleon) -> None:
    fields: dict[str, Any] = {"modalities": ["text"], "seed": 0, "max_tokens": 6}
    reply = server.chat("Name a fruit.", logprobs=True, top_logprobs=2, **fields).json()
    entries = reply["choices"][0]["logprobs"]["content"]
    expected = model.generate("Name a fruit.", "text", seed=0, max_tokens=6, logprobs=2)
    text_entries = [
        entry for entry in expected.logprobs or [] if model.processor.token_bytes(entry.id)
    ]
    assert [(e["token"], e["logprob"]) for e in entries] == [
        (d.text, d.logprob) for d in text_entries
    ]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(text_entries)
    assert b"".join(bytes(e["bytes"]) for e in entries).decode().strip() == expected.text
    streamed = server.chat("Name a fruit.", logprobs=True, top_logprobs=2, stream=True, **fields)
    pieces = [e["choices"][0]["logprobs"] for _, e in events(streamed.text)[:-1]]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == entries


def test_a_begun_answer_is_continued(server: Running, model: Chameleon) -> None:
    begun = [*user("What is red and sweet?"), {"role": "assistant", "content": "It is a"}]
    reply = server.chat(begun, max_tokens=5, modalities=["text"]).json()
    turns = [Message("user", "What is red and sweet?"), Message("assistant", "It is a")]
    expected = model.generate(turns, "text", max_tokens=5).text
    assert reply["choices"][0]["message"]["content"] == expected


def test_system_texts_and_developers(server: Running, model: Chameleon) -> None:
    turns = [Message("system", "Answer in one word."), Message("user", "Hello")]
    expected = list(model.request(turns, "text", seed=0).ids)
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Answer in one word."}, *user("Hello")]
        assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == expected


def test_the_same_reply_alone_and_among_concurrent_requests(
    server: Running, model: Chameleon
) -> None:
    prompts = [FRUITS, "Draw a red apple.", "Name a fruit.", "Draw a cat."]

    def ask(number: int) -> Any:
        reply = server.chat(prompts[number % 4], seed=number, temperature=1).json()
        return reply["choices"][0]["message"]

    with ThreadPoolExecutor(8) as pool:
        messages = list(pool.map(ask, range(8)))
    for number, message in enumerate(messages):
        expected = model.generate(prompts[number % 4], seed=number, temperature=1)
        assert message["content"] == expected.text
        images = [pixels(one["image_url"]["url"]) for one in message.get("images", [])]
        assert len(images) == len(expected.images)
        assert all(map(same, images, expected.images))


# --- images ---


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_generations(client: openai.OpenAI, model: Chameleon, form: Any) -> None:
    reply = client.images.generate(
        prompt="Draw a cat.", n=2, output_format=form, extra_body={"seed": 4}
    )
    assert reply.data is not None and len(reply.data) == 2 and reply.output_format == form
    images = [pixels(one.b64_json or "") for one in reply.data]
    assert all(one.size == (64, 64) for one in images) and reply.size == "64x64"
    if form == "png":
        expected = model.generate_batch(["Draw a cat."] * 2, "image", seed=4)
        assert all(map(same, images, [one.images[0] for one in expected]))
    assert reply.usage is not None and reply.usage.output_tokens == 132


def test_generations_by_address(client: openai.OpenAI, server: Running) -> None:
    reply = client.images.generate(prompt="Draw a cat.", response_format="url", size="64x64")  # type: ignore[call-overload]
    assert reply.data[0].b64_json is None
    response = server.get(reply.data[0].url.removeprefix(server.url))
    assert pixels(response.content).size == (64, 64)


def test_generations_with_partial_images(client: openai.OpenAI, model: Chameleon) -> None:
    with client.images.generate(
        prompt="Draw a cat.", stream=True, partial_images=2, extra_body={"seed": 4}
    ) as stream:
        received = list(stream)
    kinds = [event.type for event in received]
    assert kinds == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in received] == [0, 1, None]
    expected = answer("Draw a cat.", "image", 4).images[0]
    assert same(pixels(received[-1].b64_json), expected)
    assert not same(pixels(received[0].b64_json), expected)


def test_edits(client: openai.OpenAI, model: Chameleon) -> None:
    words = "Redraw this in another style."
    with STRAWBERRY.open("rb") as file:
        reply = client.images.edit(image=file, prompt=words, extra_body={"seed": 2})
    expected = model.generate([Image.open(STRAWBERRY), words], "image", seed=2)
    assert reply.data is not None
    assert same(pixels(reply.data[0].b64_json or ""), expected.images[0])
    data = STRAWBERRY.read_bytes()
    with client.images.edit(
        image=[data, data], prompt=words, stream=True, partial_images=1, extra_body={"seed": 2}
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


def test_edits_of_a_generated_image_use_its_codes(server: Running, model: Chameleon) -> None:
    reply = server.post("/v1/images/generations", {"prompt": "Draw a cat.", "seed": 1}).json()
    first = answer("Draw a cat.", "image", 1)
    url = "data:image/png;base64," + reply["data"][0]["b64_json"]
    number = server.chat(user(image(url), text("What?")), modalities=["text"], max_tokens=4)
    assert number.status_code == 200
    by_url = {"prompt": "Draw a cat.", "seed": 1, "response_format": "url"}
    address = server.post("/v1/images/generations", by_url).json()["data"][0]["url"]
    body = {"prompt": "Now in red.", "seed": 2, "images": [{"image_url": address}]}
    edited = server.post("/v1/images/edits", body).json()
    expected = model.generate([first.message.images[0], "Now in red."], "image", seed=2)
    assert same(pixels(edited["data"][0]["b64_json"]), expected.images[0])


def test_variations(client: openai.OpenAI, model: Chameleon) -> None:
    # OpenAI's own route was taken away; the SDK still has its method.
    with STRAWBERRY.open("rb") as file, pytest.warns(DeprecationWarning):
        reply = client.images.create_variation(image=file, n=2, extra_body={"seed": 2})
    prompt = [Image.open(STRAWBERRY), "Draw the same thing again."]
    expected = model.generate_batch([prompt] * 2, "image", seed=2)
    assert reply.data is not None
    images = [pixels(one.b64_json or "") for one in reply.data]
    assert all(map(same, images, [one.images[0] for one in expected])) and len(images) == 2


# --- responses ---

DRAWS: Any = [{"type": "image_generation", "partial_images": 2}]


def test_responses_in_order(client: openai.OpenAI, model: Chameleon) -> None:
    expected = answer(FRUITS, "auto", 0)
    reply = client.responses.create(model="mini", input=FRUITS, tools=DRAWS, extra_body={"seed": 0})
    kinds = [item.type for item in reply.output]
    assert kinds == ["message", "image_generation_call"] * 2
    texts = [s.text.strip() for s in expected.segments if isinstance(s, Text)]
    assert reply.status == "completed" and reply.output_text == "".join(texts)
    images = [pixels(i.result or "") for i in reply.output if i.type == "image_generation_call"]
    assert all(map(same, images, expected.images))
    assert reply.usage is not None and reply.usage.output_tokens == expected.usage.completion_tokens


def test_all_events_of_responses(client: openai.OpenAI) -> None:
    with client.responses.create(
        model="mini", input=FRUITS, tools=DRAWS, stream=True, extra_body={"seed": 0}
    ) as stream:
        received = list(stream)
    assert [event.sequence_number for event in received] == list(range(len(received)))
    kinds = [event.type.removeprefix("response.") for event in received]
    text_item = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    image_item = [
        "output_item.added",
        "image_generation_call.in_progress",
        "image_generation_call.generating",
        "image_generation_call.partial_image",
        "image_generation_call.partial_image",
        "image_generation_call.completed",
        "output_item.done",
    ]
    without_repeats = [
        kind for i, kind in enumerate(kinds) if kind != "output_text.delta" or kinds[i - 1] != kind
    ]
    assert without_repeats == [
        "created",
        "in_progress",
        *text_item,
        *image_item,
        *text_item,
        *image_item,
        "completed",
    ]
    final = received[-1].response  # type: ignore[union-attr]
    done = [event.item for event in received if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    deltas = "".join(e.delta for e in received if e.type == "response.output_text.delta")
    assert deltas == final.output_text
    places = [e.output_index for e in received if e.type == "response.output_item.done"]
    assert places == [0, 1, 2, 3]


def test_a_text_that_the_limit_cut_is_incomplete(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "mini", "input": "Name a fruit.", "temperature": 0}
    cut = client.responses.create(**fields, max_output_tokens=1)
    assert cut.status == "incomplete" and [item.status for item in cut.output] == ["incomplete"]
    complete = client.responses.create(**fields)
    assert complete.status == "completed" and [item.status for item in complete.output] == [
        "completed"
    ]


def test_a_response_continues_the_previous_one(client: openai.OpenAI, model: Chameleon) -> None:
    first = client.responses.create(
        model="mini", input="Draw a cat.", tools=DRAWS, extra_body={"seed": 1}
    )
    second = client.responses.create(
        model="mini", input="What is this?", previous_response_id=first.id, max_output_tokens=8
    )
    before = answer("Draw a cat.", "interleaved", 1)
    turns = [Message("user", "Draw a cat."), before.message, Message("user", "What is this?")]
    expected = model.generate(turns, "text", max_tokens=8)
    assert second.output_text == expected.text
    # The same by sending the items back, with the image or by its id alone, or references to them.
    for back in (
        [item.model_dump(exclude_none=True) for item in first.output],
        [item.model_dump(exclude_none=True, exclude={"result"}) for item in first.output],
        [{"type": "item_reference", "id": item.id} for item in first.output],
    ):
        sent: Any = [{"role": "user", "content": "Draw a cat."}, *back]
        sent += [{"role": "user", "content": [{"type": "input_text", "text": "What is this?"}]}]
        other = client.responses.create(model="mini", input=sent, max_output_tokens=8)
        assert other.output_text == expected.text
        assert other.usage is not None and second.usage is not None
        assert other.usage.input_tokens == second.usage.input_tokens
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="there is no response"):
        client.responses.create(model="mini", input="Hi", previous_response_id=first.id)
    with pytest.raises(openai.BadRequestError, match="there is no item"):
        client.responses.create(model="mini", input=sent)


def test_texts_and_images_are_found_by_the_ids_of_their_items(
    server: Running, model: Chameleon
) -> None:
    body = {"input": FRUITS, "tools": DRAWS, "seed": 0}
    first = server.post("/v1/responses", body).json()
    assert len({item["type"] for item in first["output"]}) == 2
    # In another order, to see that each is the one of its id.
    items = [{"type": "item_reference", "id": item["id"]} for item in reversed(first["output"])]
    question = {"role": "user", "content": "What is this?"}
    sent = [{"role": "user", "content": FRUITS}, *items, question]
    second = server.post("/v1/responses", {"input": sent, "max_output_tokens": 8}).json()
    before = answer(FRUITS, "interleaved", 0).segments
    turns = [Message("user", FRUITS), Message("assistant", before[::-1])]
    turns.append(Message("user", "What is this?"))
    expected = model.generate(turns, "text", max_tokens=8)
    assert second["usage"]["input_tokens"] == expected.usage.prompt_tokens
    assert [part["text"] for part in second["output"][0]["content"]] == [expected.text]


@pytest.mark.parametrize("before", [True, False])
def test_a_call_beside_the_user_s_message_is_its_image(
    server: Running, model: Chameleon, before: bool
) -> None:
    first = server.post("/v1/responses", {"input": "Draw a cat.", "tools": DRAWS, "seed": 1})
    [drawn] = [item for item in first.json()["output"] if item["type"] != "message"]
    call = {"type": "image_generation_call", "id": drawn["id"]}
    question = {"role": "user", "content": "What is this?"}
    sent = [call, question] if before else [question, call]
    reply = server.post("/v1/responses", {"input": sent, "max_output_tokens": 8}).json()
    [cat] = answer("Draw a cat.", "interleaved", 1).message.images
    turns = [Message("user", [cat, Text("What is this?")])]
    expected = model.generate(turns, "text", max_tokens=8)
    assert expected.text and reply["output"][0]["content"][0]["text"] == expected.text


def test_instructions_alone_are_no_conversation(server: Running) -> None:
    body = {"input": [], "instructions": "Name a fruit.", "max_output_tokens": 4}
    reply = server.post("/v1/responses", body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "input"


def test_conversations_about_photographs_are_kept_as_long_as_others(
    client: openai.OpenAI,
) -> None:
    def about(shade: int) -> Any:
        photograph = PIL.Image.new("RGB", (3000, 3000), (shade, 90, 90))
        file = io.BytesIO()
        photograph.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "input_image", "image_url": url}]
        content: Any = [{"role": "user", "content": parts}]
        return client.responses.create(model="mini", input=content, max_output_tokens=1)

    first, *others = [about(shade) for shade in (10, 90, 170, 250)]
    assert len(others) == 3
    went_on = client.responses.create(
        model="mini", input="Draw it.", previous_response_id=first.id, max_output_tokens=1
    )
    assert first.usage and went_on.usage
    assert went_on.usage.input_tokens > first.usage.input_tokens > 64


def test_a_begun_answer_is_one_turn_of_a_conversation(server: Running, model: Chameleon) -> None:
    begun = [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "A"}]
    first = server.post("/v1/responses", {"input": begun, "max_output_tokens": 4}).json()
    body = {"input": "And blue?", "previous_response_id": first["id"], "max_output_tokens": 4}
    assert server.post("/v1/responses", body).status_code == 200
    turns = [Message("user", "What is red?"), Message("assistant", "A")]
    rest = model.generate(turns, "text", max_tokens=4)
    turns[1] = Message("assistant", ["A", *rest.segments])
    expected = model.generate([*turns, Message("user", "And blue?")], "text", max_tokens=4)
    second = server.post("/v1/responses", body).json()
    assert second["usage"]["input_tokens"] == expected.usage.prompt_tokens
    texts = [part["text"] for item in second["output"] for part in item["content"]]
    assert texts == [expected.text] * bool(expected.text)


def test_responses_read_images_and_instructions(server: Running, model: Chameleon) -> None:
    parts = [{"type": "input_image", "image_url": data_url()}]
    parts.append({"type": "input_text", "text": "What is this?"})
    body = {"input": [{"role": "user", "content": parts}], "instructions": "Be brief."}
    reply = server.post("/v1/responses", body | {"max_output_tokens": 8}).json()
    turns = [
        Message("system", "Be brief."),
        Message("user", [Image.open(STRAWBERRY), Text("What is this?")]),
    ]
    expected = model.generate(turns, "text", max_tokens=8)
    assert reply["output"][0]["content"][0]["text"] == expected.text
    assert reply["usage"]["input_tokens"] == expected.usage.prompt_tokens
    cut = server.post("/v1/responses", {"input": "Name a fruit.", "max_output_tokens": 1}).json()
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


# --- the others ---


def test_completions(client: openai.OpenAI, model: Chameleon) -> None:
    prompts = ["Name a fruit.", "Name an animal."]
    reply = client.completions.create(
        model="mini", prompt=prompts, n=2, seed=3, temperature=1, max_tokens=6, logprobs=1
    )
    expected = [
        model.generate(prompt, "text", seed=3 + i, temperature=1, max_tokens=6, logprobs=1).text
        for prompt in prompts
        for i in range(2)
    ]
    assert [choice.text for choice in reply.choices] == expected
    with client.completions.create(
        model="mini", prompt="Name a fruit.", stream=True, max_tokens=6
    ) as stream:
        streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == model.generate("Name a fruit.", "text", max_tokens=6).text


def test_offsets_of_tokens_are_those_in_the_text(server: Running) -> None:
    # Tokens that are parts of Korean letters.
    body = {"prompt": "사과를 그려 줘. 뭐야?", "temperature": 0, "max_tokens": 24, "logprobs": 0}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert "\ufffd" in "".join(tokens) and "\ufffd" not in choice["text"]
    placed = list(zip(offsets, tokens, strict=True))
    complete = [(at, token) for at, token in placed if "\ufffd" not in token]
    assert complete and all(choice["text"].startswith(token, at) for at, token in complete)
    assert offsets == sorted(offsets)


def test_errors_name_fields_as_the_route_spells_them(server: Running) -> None:
    image_request = {
        "messages": [{"role": "user", "content": "Draw a cat."}],
        "modalities": ["image"],
    }
    tools = {"tools": [{"type": "image_generation"}], "tool_choice": "required"}
    for path, body, field in (
        ("/v1/chat/completions", image_request, "max_tokens"),
        ("/v1/chat/completions", image_request, "max_completion_tokens"),
        ("/v1/responses", {"input": "Draw a cat."} | tools, "max_output_tokens"),
    ):
        error = server.post(path, body | {field: 5}).json()["error"]
        assert error["param"] == field and error["message"].startswith(f"{field}=5 cannot hold")
    error = server.post("/v1/images/generations", {"prompt": "a", "size": "5x7"}).json()["error"]
    assert error["message"] == "size=5x7 is not a size of this model: use auto or 64x64"


def test_models(client: openai.OpenAI) -> None:
    [listed] = client.models.list().data
    assert listed.id == "mini" and client.models.retrieve("mini").id == "mini"
    extra = listed.model_extra or {}
    assert extra["input_modalities"] == extra["output_modalities"] == ["text", "image"]


def test_files(client: openai.OpenAI, server: Running, model: Chameleon) -> None:
    with STRAWBERRY.open("rb") as data:
        file = client.files.create(file=data, purpose="vision")
    assert client.files.retrieve(file.id).bytes == STRAWBERRY.stat().st_size
    assert client.files.content(file.id).read() == STRAWBERRY.read_bytes()
    parts = [{"type": "file", "file": {"file_id": file.id}}, text("What is this?")]
    reply = server.chat(user(*parts), max_tokens=8).json()
    expected = model.generate([Image.open(STRAWBERRY), "What is this?"], max_tokens=8)
    assert reply["choices"][0]["message"]["content"] == expected.text
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.BadRequestError, match="no format that is read"):
        client.files.create(file=io.BytesIO(b"text"), purpose="vision")
    with pytest.raises(openai.BadRequestError, match="files do not expire") as error:
        client.files.create(
            file=STRAWBERRY,
            purpose="vision",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert error.value.param == "expires_after[anchor]"


def test_tokenize_and_back(server: Running, model: Chameleon) -> None:
    words = "안녕, a red apple."
    reply = server.post("/tokenize", {"prompt": words, "return_token_strs": True}).json()
    assert reply["tokens"] == model.processor.encode_text(words)
    assert reply["count"] == len(reply["token_strs"]) and reply["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": words}


def test_errors_are_the_classes_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here: use 'mini'"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="mini", messages=[{"role": "user", "content": "a"}], temperature=-1
        )
    assert error.value.param == "temperature" and error.value.code == "invalid_value"
    assert "use 0 (greedy) or a number from 0.01 to 100" in error.value.message
    assert error.value.request_id
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="mini", messages=[{"role": "user", "content": "a " * 2000}]
        )
    assert error.value.code == "context_length_exceeded"


def test_what_would_be_ignored_is_refused(server: Running) -> None:
    end = server.service.model.config.vocab_size
    beyond = server.post("/detokenize", {"tokens": [1, end]}).json()["error"]
    assert beyond["param"] == "tokens[1]" and str(end - 1) in beyond["message"]
    number = server.post("/v1/responses", {"input": "Name a fruit."}).json()["id"]
    assert server.get(f"/v1/responses/{number}").status_code == 200
    streamed = server.get(f"/v1/responses/{number}?stream=true")
    assert streamed.status_code == 400 and streamed.json()["error"]["param"] == "stream"
    assert server.post("/tokenize", {}).json()["error"]["param"] is None


def test_helpers_of_the_sdk(client: openai.OpenAI) -> None:
    fields: Any = {"model": "mini", "messages": [{"role": "user", "content": "Name a fruit."}]}
    with client.chat.completions.stream(**fields, seed=1, max_tokens=20) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0].message.content
    complete = client.chat.completions.create(**fields, seed=1, max_tokens=20)
    assert streamed == complete.choices[0].message.content and "content.done" in kinds
    tool: Any = [{"type": "image_generation", "partial_images": 2}]
    with client.responses.stream(
        model="mini", input="Show me two different fruits.", tools=tool
    ) as events:
        types = [event.type for event in events]
        final = events.get_final_response()
    assert types[-1] == "response.completed" and final.output
    raw = client.chat.completions.with_raw_response.create(**fields, max_tokens=2)
    assert raw.headers["x-request-id"] == raw.request_id and raw.parse().choices
    assert client.models.retrieve("mini").id == "mini"
