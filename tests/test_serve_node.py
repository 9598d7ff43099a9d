"""OpenAI's npm package against a running server; what it does is in openai_client.cjs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serve_case import STRAWBERRY, answer, mini, pixels, running

from earlyfusion import Image, Text

pytestmark = pytest.mark.browser  # CI installs Node with the browser
SCRIPT = Path(__file__).with_name("openai_client.cjs")
FRUITS = "Show me two different fruits."


def node_path() -> str | None:
    """Where the package is installed; None without Node or the package."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        return None
    folders = [os.environ.get("NODE_PATH", "")]
    if npm is not None:
        result = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)
        folders.append(result.stdout.strip())
    existing = [f for f in folders if f and (Path(f) / "openai" / "package.json").is_file()]
    return existing[0] if existing else None


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    folder = node_path()
    if folder is None:
        pytest.skip("Node or its package openai is not installed: npm install -g openai")
    with running(api_keys=("secret-key",)) as server:
        done = subprocess.run(
            ["node", str(SCRIPT), server.url, str(STRAWBERRY)],
            env={**os.environ, "NODE_PATH": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def decoded(data: str) -> bytes:
    return pixels(data).tobytes()


def test_images_in_and_out(results: dict[str, Any]) -> None:
    prompt = [Image.open(STRAWBERRY), "What is this?"]
    assert results["models"] == ["mini"]
    assert results["imageInput"]["text"] == mini().generate(prompt, seed=0).text
    assert results["imageInput"]["usage"]["image_tokens"] == 66
    assert decoded(results["imageOutput"]) == answer("Draw a cat.", "image", 1).images[0].tobytes()
    assert results["parsed"]["name"] in ("apple", "pear")


def test_an_interleaved_stream_in_order(results: dict[str, Any]) -> None:
    reply = answer(FRUITS, "auto", 0)
    parts = results["interleaved"]["parts"]
    assert len(parts) == len(reply.segments) == 4
    images = iter(reply.images)
    for part, segment in zip(parts, reply.segments, strict=True):
        if isinstance(segment, Text):
            assert part["text"].strip() == segment.text
        else:
            assert decoded(part["image"]) == next(images).tobytes()
    assert results["interleaved"]["reason"] == "stop"
    usage = results["interleaved"]["usage"]
    assert usage["completion_tokens"] == reply.usage.completion_tokens


def test_responses_with_all_events(results: dict[str, Any]) -> None:
    reply, responses = answer(FRUITS, "auto", 0), results["responses"]
    numbers = [number for number, _ in responses["events"]]
    assert numbers == list(range(len(numbers)))
    names = [name for _, name in responses["events"]]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert names.count("response.image_generation_call.partial_image") == 4
    for stage in ("in_progress", "generating", "completed"):
        assert names.count(f"response.image_generation_call.{stage}") == 2
    kinds = ["message", "image_generation_call"] * 2
    assert [kind for kind, _ in responses["output"]] == kinds
    texts = [value for kind, value in responses["output"] if kind == "message"]
    assert texts == reply.text.split("\n")
    images = [value for kind, value in responses["output"] if kind != "message"]
    assert [decoded(data) for data in images] == [image.tobytes() for image in reply.images]


def test_images_with_partials_and_edits(results: dict[str, Any]) -> None:
    names = [name for name, _ in results["generations"]]
    assert names == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    cat = answer("Draw a cat.", "image", 1).images[0].tobytes()
    assert decoded(results["generations"][-1][1]) == cat != decoded(results["generations"][0][1])
    words = [Image.open(STRAWBERRY), "Redraw this in another style."]
    expected = mini().generate(words, "image", seed=2).images[0]
    assert decoded(results["edits"]) == expected.tobytes()


def test_errors_are_the_classes_of_the_package(results: dict[str, Any]) -> None:
    kinds = [failure[:3] for failure in results["failures"]]
    assert kinds == [
        ["BadRequestError", 400, "temperature"],
        ["BadRequestError", 400, "temprature"],
        ["NotFoundError", 404, "model"],
        ["NotFoundError", 404, None],
        ["AuthenticationError", 401, None],
    ]
    assert "did you mean temperature?" in results["failures"][1][3]
