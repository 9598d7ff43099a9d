"""The page at /: its files and headers; and in Chromium (marked `browser`) what people do with it.

The browser's tests need the packages of the extra `browser` and a Chromium of the system; without
them they are skipped. Screenshots are left in pytest's temporary folder.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
from serve_case import STRAWBERRY, Running, mini, running
from test_serve_adapters import adapter

import earlyfusion
from earlyfusion import Chameleon

FOLDER = Path(earlyfusion.__file__).parent / "serve" / "page"
CHROMIUM = which("chromium") or which("chromium-browser")
SECONDS = 120  # much longer than needed: the machine may be busy
PHONE = {
    "viewport": {"width": 320, "height": 640},
    "is_mobile": True,
    "has_touch": True,
    "locale": "ko-KR",
    "color_scheme": "dark",
}
DONE = ".turn:last-child .meta:not(:empty)"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


# --- files ---


def test_every_file_is_served_with_its_type_and_a_strict_policy(server: Running) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    types[".svg"] = "image/svg+xml"
    for file in FOLDER.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        reply = server.get(path)
        assert reply.status_code == 200 and reply.content == file.read_bytes()
        assert reply.headers["content-type"].partition(";")[0] == types[file.suffix]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_an_unchanged_file_is_not_sent_again(server: Running) -> None:
    tag = server.get("/page/app.js").headers["etag"]
    second = server.get("/page/app.js", **{"if-none-match": f'"other", W/{tag}'})
    assert second.status_code == 304 and not second.content
    assert httpx.head(server.url + "/").headers["content-length"]
    assert server.get("/page/..%2fapp.py").status_code == 404


def test_the_page_needs_no_key_and_what_it_asks_does() -> None:
    with running(api_keys=("a-secret-key",)) as server:
        assert server.get("/").status_code == server.get("/page/app.js").status_code == 200
        assert server.get("/v1/models").status_code == 401


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = "".join(file.read_text("utf-8") for file in FOLDER.iterdir())
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a format
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_both_languages_have_every_word() -> None:
    text = (FOLDER / "words.js").read_text("utf-8")
    english, korean = re.findall(r"^  (?:en|ko): \{\n(.*?)^  \},", text, re.M | re.S)
    words = [re.findall(r"^    (\w+): \"(.*)\",$", part, re.M) for part in (english, korean)]
    assert [name for name, _ in words[0]] == [name for name, _ in words[1]]
    filled = [{name: set(re.findall(r"\{\w+\}", word)) for name, word in part} for part in words]
    assert filled[0] == filled[1]
    code = "".join(file.read_text("utf-8") for file in FOLDER.iterdir() if file.name != "words.js")
    used = set(re.findall(r"\bt\(\"(\w+)\"|data-t(?:-\w+)?=\"(\w+)\"|button\(\"(\w+)\"", code))
    assert {next(filter(None, names)) for names in used} <= set(filled[0])


# --- in Chromium ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visitor:
    """Somebody at the page. Errors on the page, and requests to elsewhere, fail the test."""

    def __init__(self, browser: Any, url: str, shots: Path, **options: Any) -> None:
        self._context = browser.new_context(**options)
        self._shots, self._url = shots, url
        self.page = self._context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.goto(url)

    def _console(self, message: Any) -> None:
        expected = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not expected:
            self.errors.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:")):
            self.errors.append(f"asks {request.url}")

    def choose(self, output: str) -> None:
        self.page.check(f"[name=output][value={output}]", force=True)

    def set(self, **settings: Any) -> None:
        self.page.click("#settings-button")
        for name, value in settings.items():
            self.page.fill(f"#settings [name={name}]", str(value))
        self.page.keyboard.press("Escape")

    def say(self, words: str) -> None:
        self.page.fill("#prompt", words)
        self.page.press("#prompt", "Enter")

    def wait(self) -> None:
        self.page.wait_for_selector(DONE)
        self.page.wait_for_selector("#stop", state="hidden")

    def drop(self, file: Path) -> None:
        """Drop a file onto the page."""
        self._give(
            file,
            """(transfer) => {
                const event = { dataTransfer: transfer, bubbles: true, cancelable: true };
                document.body.dispatchEvent(new DragEvent("dragover", event));
                document.body.dispatchEvent(new DragEvent("drop", event));
            }""",
        )

    def paste(self, file: Path) -> None:
        """Paste a file into the text field."""
        self._give(
            file,
            """(transfer) => {
                const event = { clipboardData: transfer, bubbles: true, cancelable: true };
                document.querySelector("#prompt").dispatchEvent(new ClipboardEvent("paste", event));
            }""",
        )

    def _give(self, file: Path, dispatch: str) -> None:
        """Call a function of JavaScript with a DataTransfer that holds the file."""
        data = base64.b64encode(file.read_bytes()).decode()
        self.page.evaluate(
            f"""([data, name]) => {{
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, {{ type: "image/png" }}));
                ({dispatch})(transfer);
            }}""",
            [data, file.name],
        )
        self.page.wait_for_selector("#attached img")

    def copied(self, name: str) -> str:
        """What a button of the last reply copies."""
        self.page.evaluate(
            "navigator.clipboard.writeText = async (text) => { window.copied = text; }"
        )
        self.page.click(f".turn:last-child .actions >> text={name}")
        return str(self.page.evaluate("window.copied"))

    def texts(self, selector: str) -> list[str]:
        return list(self.page.locator(selector).all_text_contents())

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=self._shots / f"{name}.png")

    def wait_for_the_end(self) -> None:
        """Until the conversation, which is higher than the window, is scrolled to its end."""
        self.page.wait_for_function(
            "() => { const t = document.getElementById('thread');"
            " return t.scrollTop > 0 && t.scrollHeight - t.scrollTop - t.clientHeight < 2; }",
            timeout=20_000,
        )

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        return bool(width <= self.page.viewport_size["width"])

    def close(self) -> None:
        self._context.close()
        assert not self.errors


@pytest.fixture
def visit(browser: Any, server: Running, tmp_path: Path) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def begin(url: str = server.url, **options: Any) -> Visitor:
        options = {"locale": "en-GB", "viewport": {"width": 1200, "height": 900}} | options
        visitors.append(Visitor(browser, url, tmp_path, **options))
        return visitors[-1]

    yield begin
    for visitor in visitors:
        visitor.close()


def slowed(server: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make the engine take at least so long for a step."""
    from time import sleep

    engine = server.service.driver.engine
    step = engine.step

    def slow() -> Any:
        sleep(seconds)
        return step()

    monkeypatch.setattr(engine, "step", slow)


@pytest.mark.browser
def test_asks_about_a_dropped_image(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.drop(STRAWBERRY)
    visitor.shoot("dropped")
    visitor.say("What is this?")
    visitor.wait()
    assert visitor.texts(".model .text") == ["strawberry"]
    assert visitor.count(".user .frame img") == 1 and visitor.count("#attached li") == 0
    [meta] = visitor.texts(".meta")
    assert "complete" in meta and "text tokens" in meta and "s in all" in meta and "seed" in meta
    assert "strawberry" in visitor.texts("#live")[0]
    visitor.shoot("answered")


@pytest.mark.browser
def test_asks_about_a_pasted_image(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.paste(STRAWBERRY)
    visitor.say("What is this?")
    visitor.wait()
    assert visitor.texts(".model .text") == ["strawberry"]
    assert visitor.count(".user .frame img") == 1 and visitor.count("#attached li") == 0


@pytest.mark.browser
def test_an_image_appears_row_by_row(
    visit: Callable[..., Visitor], server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(server, monkeypatch, 0.02)
    visitor = visit()
    visitor.page.evaluate(
        """() => {
            window.cut = new Set();
            const note = () => {
                for (const image of document.querySelectorAll(".generating img[src^=data]")) {
                    window.cut.add(parseFloat(image.style.clipPath.split(" ")[2]));
                }
            };
            const options = { subtree: true, childList: true, attributes: true };
            new MutationObserver(note).observe(document.getElementById("turns"), options);
        }"""
    )
    visitor.choose("image")
    visitor.set(seed=3)
    visitor.say("Draw a red apple.")
    visitor.page.wait_for_selector(".generating img[src^=data]")
    visitor.shoot("drawing")
    visitor.wait()
    # What was not drawn yet was cut off: three quarters of the image, half of it, one quarter;
    # one of them may be overtaken by the next before it is painted.
    cut = visitor.page.evaluate("[...window.cut]")
    assert len(cut) >= 2 and cut == [part for part in (75, 50, 25) if part in cut]
    assert visitor.count(".generating") == 0 and "66 image tokens" in visitor.texts(".meta")[0]
    visitor.shoot("drawn")
    # The image on the page is the one that the same seed gives without the page.
    shown = visitor.page.get_attribute(".model .frame img", "src")
    asked = {"modalities": ["image"], "seed": 3}
    message = server.chat("Draw a red apple.", **asked).json()["choices"][0]["message"]
    assert message["images"][0]["image_url"]["url"] == shown
    with visitor.page.expect_download() as download:
        visitor.page.click("text=Download")
    assert download.value.suggested_filename == "image-3-1.png"


@pytest.mark.browser
def test_stops_and_the_engine_is_free(
    visit: Callable[..., Visitor], server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(server, monkeypatch, 0.1)
    visitor = visit()
    visitor.choose("image")
    visitor.say("Draw a red apple.")
    visitor.page.wait_for_selector(".generating")
    visitor.page.click("#stop")
    visitor.wait()
    assert "stopped by you" in visitor.texts(".meta")[0]
    server.wait_until_idle()
    # Leaving the page stops as well, and what was asked stays.
    visitor.say("Draw a cat.")
    visitor.page.wait_for_selector(".turn:last-child .generating")
    visitor.page.reload()
    visitor.wait()
    assert visitor.texts(".user .text") == ["Draw a red apple.", "Draw a cat."]
    assert "stopped by you" in visitor.texts(".meta")[1]
    server.wait_until_idle()


@pytest.mark.browser
def test_edits_a_turn_and_regenerates(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.drop(STRAWBERRY)
    visitor.choose("text")
    visitor.say("What colour is it?")
    visitor.wait()
    visitor.say("Which kind of thing is it?")
    visitor.wait()
    assert visitor.count(".turn") == 4
    visitor.page.focus(".user .actions button >> nth=0")
    visitor.page.keyboard.press("Enter")
    visitor.page.fill(".editing textarea", "What is this?")
    visitor.shoot("editing")
    visitor.page.click("text=Send again")
    visitor.wait()
    assert visitor.count(".turn") == 2 and visitor.texts(".model .text") == ["strawberry"]
    # Another reply to the same words, now as an image.
    visitor.choose("image")
    visitor.page.click("text=Regenerate")
    visitor.page.wait_for_selector(".strip")
    visitor.wait()
    assert visitor.count(".strip button") == 2 and visitor.count(".strip img") == 1
    visitor.page.click(".strip button >> nth=0")
    assert visitor.page.get_attribute(".strip button >> nth=0", "aria-pressed") == "true"


@pytest.mark.browser
def test_varies_and_restyles_by_a_click_with_several_replies(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.set(replies=2, seed=5)
    visitor.drop(STRAWBERRY)
    visitor.choose("text")
    visitor.say("What is this?")
    visitor.wait()
    visitor.page.hover(".user .frame")
    visitor.page.click(".user >> text=Vary")
    visitor.wait()
    visitor.page.wait_for_selector(".turn:last-child .strip button:nth-child(2) img")
    assert visitor.count(".turn:last-child .frame img") == 1
    visitor.page.click(".turn:last-child summary")
    visitor.shoot("restyle")
    visitor.page.click(".turn:last-child .choices >> text=3D")
    visitor.wait()
    assert "3D" in visitor.texts(".user .text")[-1]
    visitor.wait_for_the_end()
    # The prompt begins at the image: what was said before is not in the request.
    [asked] = json.loads(visitor.copied("Copy as curl").split("<<'JSON'\n")[1][:-6])["messages"]
    assert [part["type"] for part in asked["content"]] == ["image_url", "text"]


@pytest.mark.browser
def test_a_reload_keeps_conversations_and_text_stays_text(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.choose("text")
    visitor.say("<img src=x onerror=alert(1)> What is a cat?")
    visitor.wait()
    visitor.page.click("#new")
    visitor.drop(STRAWBERRY)
    visitor.say("What is this?")
    visitor.wait()
    visitor.page.wait_for_selector("#list li:nth-child(2)")
    visitor.page.reload()
    visitor.page.wait_for_selector("#list li:nth-child(2)")
    assert (
        visitor.texts(".model .text") == ["strawberry"] and visitor.count(".user .frame img") == 1
    )
    visitor.page.click("#list li:nth-child(2) .wide")
    # Not the title in the list, which has the same words and is there before the turn.
    visitor.page.wait_for_selector(".user .text >> text=What is a cat?")
    assert visitor.texts(".user .text") == ["<img src=x onerror=alert(1)> What is a cat?"]
    visitor.page.on("dialog", lambda dialog: dialog.accept())
    visitor.page.click("#list li:nth-child(2) .small")
    visitor.page.wait_for_selector("#list li:nth-child(2)", state="detached")
    assert visitor.count(".turn") == 0


@pytest.mark.browser
def test_copied_code_gives_the_reply_again(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    visitor = visit()
    visitor.drop(STRAWBERRY)
    visitor.choose("text")
    visitor.say("What is this?")
    visitor.wait()
    code = [sys.executable, "-c", visitor.copied("Copy as Python")]
    told = subprocess.run(code, capture_output=True, check=True, text=True, timeout=SECONDS)
    assert told.stdout == "strawberry\n"
    visitor.choose("image")
    visitor.say("Draw a red apple.")
    visitor.wait()
    shown = (visitor.page.get_attribute(".model .frame img", "src") or "").partition(",")[2]
    code = [sys.executable, "-c", visitor.copied("Copy as Python")]
    subprocess.run(code, cwd=tmp_path, check=True, timeout=SECONDS)
    assert base64.b64encode((tmp_path / "image-0.png").read_bytes()).decode() == shown
    shell = visitor.copied("Copy as curl")
    assert json.loads(shell.split("<<'JSON'\n")[1][:-6])["seed"]
    if which("curl"):
        reply = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, text=True)
        message = json.loads(reply.stdout)["choices"][0]["message"]
        assert message["images"][0]["image_url"]["url"].endswith(shown)


@pytest.mark.browser
def test_sends_a_negative_prompt_and_a_schema(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["b"]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    visitor.set(json_schema=json.dumps(schema), negative_prompt="Draw a green apple.", seed=2)
    visitor.set(guidance_text=3)
    visitor.choose("text")
    visitor.say("What is a cat?")
    visitor.wait()
    assert json.loads(visitor.texts(".model .text")[0]) == {"a": "b"}
    body = json.loads(visitor.copied("Copy as curl").split("<<'JSON'\n")[1][:-6])
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert "negative_prompt" not in body, "there can be no image"
    visitor.choose("image")
    visitor.say("Draw a red apple.")
    visitor.wait()
    body = json.loads(visitor.copied("Copy as curl").split("<<'JSON'\n")[1][:-6])
    assert visitor.count(".model .frame img") == 1 and visitor.count(".error") == 0
    assert body["negative_prompt"] == "Draw a green apple." and "response_format" not in body
    # What is no schema is marked, said, and nothing is sent.
    visitor.set(json_schema="{")
    visitor.choose("text")
    visitor.say("What is a dog?")
    assert visitor.texts("#toast") == ["The JSON schema in the settings is not a JSON object"]
    assert visitor.page.input_value("#prompt") == "What is a dog?" and visitor.count(".turn") == 4
    assert visitor.page.get_attribute("[name=json_schema]", "aria-invalid") == "true"
    visitor.page.click("#settings-button")
    visitor.shoot("schema")
    visitor.page.click("#reset")
    assert visitor.page.get_attribute("[name=json_schema]", "aria-invalid") == "false"


@pytest.mark.browser
def test_one_of_several_models_is_chosen(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    model = Chameleon.load(
        "mini", adapters={"other": adapter(tmp_path / "a", mini().transformer, 3)}
    )
    with running(model=model) as server:
        visitor = visit(server.url)
        visitor.page.select_option("#model", "other")
        visitor.choose("text")
        visitor.set(seed=1)
        visitor.say("What is a cat?")
        visitor.wait()
        expected = model.generate("What is a cat?", "text", seed=1, adapter="other").text
        assert "".join(visitor.texts(".model .text")).split() == expected.split()
        visitor.page.reload()
        visitor.page.wait_for_selector("#model option", state="attached")
        assert visitor.page.input_value("#model") == "other"
        visitor.page.goto("about:blank")


@pytest.mark.browser
def test_errors_are_the_servers_sentences(visit: Callable[..., Visitor], server: Running) -> None:
    visitor = visit()
    visitor.set(temperature=-1)
    visitor.say("Hello.")
    visitor.wait()
    reply = server.chat("Hello.", temperature=-1).json()["error"]["message"]
    assert visitor.texts(".error") == [reply]
    visitor.shoot("error")


@pytest.mark.browser
def test_asks_for_the_key(visit: Callable[..., Visitor]) -> None:
    with running(api_keys=("a-secret-key",)) as server:
        visitor = visit(server.url)
        visitor.page.wait_for_selector("#key[open]")
        visitor.shoot("key")
        visitor.page.fill("#key-input", "a-secret-key")
        visitor.page.keyboard.press("Enter")
        visitor.page.wait_for_selector("#model option", state="attached")
        visitor.choose("text")
        visitor.say("What is a cat?")
        visitor.wait()
        assert visitor.count(".error") == 0
        visitor.page.goto("about:blank")


@pytest.mark.browser
def test_korean_dark_and_a_small_telephone(visit: Callable[..., Visitor]) -> None:
    visitor = visit(**PHONE)
    assert visitor.page.get_attribute("html", "lang") == "ko" and visitor.fits()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert visitor.page.evaluate(colour) == "rgb(23, 22, 21)"
    visitor.shoot("phone-empty")
    visitor.page.set_input_files("#camera", STRAWBERRY)
    visitor.page.fill("#prompt", "이게 뭐야?")
    visitor.page.click("#send")
    visitor.wait()
    assert visitor.texts(".model .text") == ["딸기"] and visitor.fits()
    visitor.shoot("phone")
    visitor.page.click("#settings-button")
    visitor.shoot("phone-settings")
    visitor.page.keyboard.press("Escape")
    visitor.page.click("#menu")
    assert visitor.fits()
    visitor.shoot("phone-list")
    visitor.page.keyboard.press("Escape")
    visitor.page.click("#language")
    assert visitor.page.get_attribute("html", "lang") == "en"
    visitor.page.click("#theme")
    assert visitor.page.evaluate(colour) == "rgb(250, 249, 247)"
    visitor.page.reload()
    assert visitor.page.get_attribute("html", "lang") == "en"
    assert visitor.page.evaluate(colour) == "rgb(250, 249, 247)"


@pytest.mark.browser
@pytest.mark.parametrize("options", [{"color_scheme": "light"}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing(visit: Callable[..., Visitor], options: dict[str, Any]) -> None:
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    visitor = visit(bypass_csp=True, **options)
    visitor.page.evaluate((Path(package.__file__).parent / "axe.min.js").read_text("utf-8"))

    def check() -> None:
        result = visitor.page.evaluate("axe.run()")["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in result] == []

    visitor.page.wait_for_selector("#model option", state="attached")
    check()
    visitor.drop(STRAWBERRY)
    check()
    visitor.set(replies=2)
    visitor.choose("interleaved")
    visitor.page.fill("#prompt", "Show me two different fruits.")
    visitor.page.click("#send")
    visitor.wait()
    check()
    visitor.page.focus(".user .actions button >> nth=0")
    visitor.page.keyboard.press("Enter")
    check()
    visitor.page.click("#settings-button")
    check()
    visitor.page.fill("[name=json_schema]", "{")
    check()
    visitor.page.keyboard.press("Escape")
    if options is PHONE:
        visitor.page.click("#menu")
        check()
