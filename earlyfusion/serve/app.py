"""The routes: each reads a body, calls the service, and writes the reply."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache, partial
from math import isinf
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from earlyfusion import __version__
from earlyfusion.api import Chameleon
from earlyfusion.content import Message, Prompt
from earlyfusion.errors import EarlyFusionError
from earlyfusion.serve import chat, completions, images, responses
from earlyfusion.serve.chat import ChatReply
from earlyfusion.serve.completions import CompletionReply
from earlyfusion.serve.driver import (
    STALE_SECONDS,
    Batch,
    EngineFailedError,
    NotReadyError,
    QueueFullError,
    RequestTimeoutError,
)
from earlyfusion.serve.errors import ApiError, report
from earlyfusion.serve.gate import Gate, RouteHandler
from earlyfusion.serve.image_io import media_type
from earlyfusion.serve.images import ImagesReply
from earlyfusion.serve.metrics import CONTENT_TYPE
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.page import page_routes
from earlyfusion.serve.protocol import (
    MAX_CHARACTERS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EditRequest,
    GenerationRequest,
    ImageOptions,
    ResponseRequest,
    StrictModel,
    TokenizeRequest,
    VariationRequest,
    read,
)
from earlyfusion.serve.replicas import Remotes
from earlyfusion.serve.replies import (
    UNREAD_SECONDS,
    DisconnectedError,
    EventStream,
    JsonReply,
    unless_disconnected,
)
from earlyfusion.serve.responses import ResponseReply
from earlyfusion.serve.service import QUICK_CHARACTERS, Service

Body = TypeVar("Body", bound=StrictModel)
IGNORED_HEADER = "x-ignored-fields"
_LARGE_JSON = 1_000_000  # bytes from which a body is parsed in a worker thread
_MAX_FORM_FIELDS = 100
_IMAGE_FIELDS = ("image", "image[]")  # of a form
_MAX_FIELD_BYTES = 1_048_576  # of a form's field that is not a file
_ERRORS = (
    ApiError,
    EarlyFusionError,
    QueueFullError,
    NotReadyError,
    EngineFailedError,
    RequestTimeoutError,
    ClientDisconnect,
)


def make_app(
    model: Chameleon, options: ServeOptions | None = None, remote: Remotes = None
) -> FastAPI:
    """The application that serves a model; its `Service` is `state.service`. With `remote` one
    engine or several run in other processes, and `model` is that of one's `EngineInfo`."""
    service = Service(model, options or ServeOptions(), remote)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="earlyfusion",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,  # the gate removes a slash at the end
        docs_url=None,  # both pages would load scripts from other servers
        redoc_url=None,
        default_response_class=JsonReply,
    )
    app.state.service = service
    for error_class in _ERRORS:
        app.add_exception_handler(error_class, _error)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(404, _no_route)
    app.add_exception_handler(405, _no_route)
    app.add_exception_handler(RequestValidationError, _no_route)
    handlers = _Routes(service).add_to(app)
    app.include_router(page_routes())
    app.add_middleware(Gate, service=service, handlers=handlers)
    if service.options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            # All headers: those of OpenAI's SDK differ between versions. As there are no cookies,
            # a web page can only send secrets that it has.
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER, "retry-after", "retry-after-ms"],
        )
    return app


async def _error(request: Request, error: Exception) -> Response:
    api_error = report(error)
    return JsonReply(api_error.body, api_error.status, api_error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path = request.url.path[:80]
    api_error = ApiError(
        status if status < 500 else 404,
        f"{request.method} {path} is not a route of this server: see docs/serve.md",
        code="unknown_route",
    )
    headers = {"Allow": ", ".join(_allowed(request))} if api_error.status == 405 else None
    return JsonReply(api_error.body, api_error.status, headers)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes at a path, where starlette's own header names the first route's."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "POST")
        # The gate answers HEAD by the routes of GET.
        if any(
            route.matches({**request.scope, "method": method.replace("HEAD", "GET")})[0]
            is Match.FULL
            for route in request.app.routes
        )
    ]


class _Routes:
    """The handlers of all routes but those of the page."""

    def __init__(self, service: Service) -> None:
        self._service, self._options = service, service.options

    def add_to(self, app: FastAPI) -> dict[str, RouteHandler]:
        """Add the routes to an application. Returns those with a JSON body, by path."""
        bodies: list[tuple[str, RouteHandler, type[StrictModel]]] = [
            ("/v1/chat/completions", self.chat, ChatRequest),
            ("/v1/completions", self.completions, CompletionRequest),
            ("/v1/responses", self.responses, ResponseRequest),
            ("/v1/images/generations", self.generations, GenerationRequest),
            ("/v1/images/edits", self.edits, EditRequest),
            ("/v1/images/variations", self.variations, VariationRequest),
            ("/tokenize", self.tokenize, TokenizeRequest),
            ("/detokenize", self.detokenize, DetokenizeRequest),
        ]
        for path, handler, model in bodies:
            schema = {"schema": model.model_json_schema(ref_template=_component("{model}"))}
            json_only, both = ["application/json"], ["application/json", "multipart/form-data"]
            types = {EditRequest: both, VariationRequest: both[1:]}.get(model, json_only)
            content = {name: dict(schema) for name in types}
            extra = {"requestBody": {"required": True, "content": content}}
            app.post(path, openapi_extra=extra)(handler)
        app.post("/v1/files")(self.upload)
        gets: list[tuple[str, Callable[..., Awaitable[Response]]]] = [
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/v1/files/{file_id}", self.file),
            ("/v1/files/{file_id}/content", self.content),
            ("/v1/responses/{response_id}", self.response),
            ("/health", self.health),
            ("/ready", self.ready),
            ("/metrics", self.metrics),
        ]
        for path, get in gets:
            app.get(path)(get)
        app.delete("/v1/files/{file_id}")(self.delete_file)
        app.delete("/v1/responses/{response_id}")(self.delete_response)
        # Cached, as FastAPI returns the same object at each call and `_openapi` changes it.
        app.openapi = cache(partial(_openapi, app.openapi))  # type: ignore[method-assign]
        return {path: handler for path, handler, _ in bodies}

    # --- generation ---

    async def chat(self, request: Request) -> Response:
        body, headers = await self._body(request, ChatRequest)
        self._service.check_model(body.model)
        reader = self._service.reader()

        def prompts() -> list[Prompt]:
            return [reader.chat(body.messages)]

        prepared = await self._service.submit(
            prompts,
            chat.spec_of(body),
            quick=chat.is_quick(body),
            fetches=self._service.fetches_images(body),
        )
        reply = ChatReply(self._service, body, prepared, partial(self._service.base_url, request))
        return await self._reply(request, reply, body.stream, prepared.batch, headers)

    async def completions(self, request: Request) -> Response:
        body, headers = await self._body(request, CompletionRequest)
        self._service.check_model(body.model)
        texts = completions.prompts_of(body)
        spec = completions.spec_of(body)
        prepared = await self._service.submit(lambda: list(texts), spec, len(texts) * body.n)
        reply = CompletionReply(self._service, body, prepared)
        return await self._reply(request, reply, body.stream, prepared.batch, headers)

    async def responses(self, request: Request) -> Response:
        body, headers = await self._body(request, ResponseRequest)
        responses.check_models(self._service, body)
        reader, turns = self._service.reader(), list[Message]()
        if body.previous_response_id is not None:
            turns += self._service.conversations.get(
                body.previous_response_id, "previous_response_id"
            ).turns
        referenced = responses.referenced(self._service, body)

        def prompts() -> list[Prompt]:
            turns.extend(reader.items(body.input, referenced))
            if not turns:  # `instructions` alone are not a prompt
                raise ApiError(
                    400, "input is empty: give a text, or at least one item", param="input"
                )
            return [responses.with_instructions(body, turns)]

        def keep_codes() -> None:
            turns[:] = self._service.model.with_codes(turns)

        spec, fetches = responses.spec_of(body), self._service.fetches_images(body)
        prepared = await self._service.submit(prompts, spec, fetches=fetches, after=keep_codes)
        reply = ResponseReply(self._service, body, prepared, turns)
        return await self._reply(request, reply, body.stream, prepared.batch, headers)

    async def generations(self, request: Request) -> Response:
        body, headers = await self._body(request, GenerationRequest)
        text = body.prompt
        quick = len(text) + len(body.negative_prompt or "") <= QUICK_CHARACTERS
        return await self._image_reply(
            request, body, lambda: text, headers, "image_generation", quick
        )

    async def edits(self, request: Request) -> Response:
        if _is_form(request):
            body, headers, files = await self._form(request, EditRequest)
        else:
            body, headers = await self._body(request, EditRequest)
            files = []
        references, reader = body.images or [], self._service.reader()
        if not (files or references):
            raise ApiError(400, "an edit needs an image: send it as image", param="image")

        def prompt() -> Prompt:
            originals = [*map(reader.file, files), *map(reader.edit_image, references)]
            return images.prompt_of(originals, body.prompt)

        return await self._image_reply(request, body, prompt, headers, "image_edit")

    async def variations(self, request: Request) -> Response:
        if not _is_form(request):
            raise ApiError(415, "the image is sent as a form: use multipart/form-data")
        body, headers, files = await self._form(request, VariationRequest)
        if len(files) != 1:
            raise ApiError(
                400, f"a variation is of one image, and {len(files)} came: send one as image"
            )
        reader = self._service.reader()

        def prompt() -> Prompt:
            return images.prompt_of([reader.file(files[0])], body.prompt)

        return await self._image_reply(request, body, prompt, headers, "image_variation")

    async def _image_reply(
        self,
        request: Request,
        body: ImageOptions,
        prompt: Callable[[], Prompt],
        headers: dict[str, str],
        event_prefix: str,
        quick: bool = False,
    ) -> Response:
        self._service.check_model(body.model)
        spec, fetches = images.spec_of(body), self._service.fetches_images(body)
        prepared = await self._service.submit(
            lambda: [prompt()], spec, quick=quick, fetches=fetches
        )
        base_url = self._service.base_url(request)
        reply = ImagesReply(self._service, body, prepared, base_url, event_prefix)
        return await self._reply(request, reply, body.stream, prepared.batch, headers)

    async def _reply(
        self,
        request: Request,
        reply: ChatReply | CompletionReply | ResponseReply | ImagesReply,
        stream: bool,
        batch: Batch,
        headers: dict[str, str],
    ) -> Response:
        if stream:
            seconds = self._options.timeout + UNREAD_SECONDS
            return EventStream(reply.stream(), batch, headers, seconds)
        try:
            content = await unless_disconnected(request.receive, reply.full())
            return JsonReply(content, headers=headers)
        except DisconnectedError:  # nobody gets this reply; its status is for the log
            return Response(status_code=499)
        finally:
            batch.close()

    # --- tokens, files, state ---

    async def tokenize(self, request: Request) -> Response:
        body, headers = await self._body(request, TokenizeRequest)
        self._service.check_model(body.model)
        ids = await self._service.tokens(body.prompt, body.messages)
        content: dict[str, Any] = {"tokens": ids, "count": len(ids)}
        content["max_model_len"] = self._service.model.config.max_position_embeddings
        if body.return_token_strs:
            content["token_strs"] = list(map(self._service.model.processor.token_text, ids))
        return JsonReply(content, headers=headers)

    async def detokenize(self, request: Request) -> Response:
        body, headers = await self._body(request, DetokenizeRequest)
        self._service.check_model(body.model)
        last = self._service.model.config.vocab_size - 1
        for i, token in enumerate(body.tokens):
            if token > last:
                raise ApiError(
                    400,
                    f"tokens[{i}]={token} is not in the vocabulary: use 0 to {last}",
                    param=f"tokens[{i}]",
                    code="invalid_value",
                )
        text = self._service.model.processor.decode_text(body.tokens)
        return JsonReply({"prompt": text}, headers=headers)

    async def upload(self, request: Request) -> Response:
        form = await _read_form(request)
        async with _closing(form):
            for field in sorted(form.keys() - {"file", "purpose"}):
                raise _unknown_upload_field(field[:60])
            uploads = form.getlist("file")
            if len(uploads) != 1:
                raise ApiError(
                    400,
                    f"an upload is one image, and {len(uploads)} came: send one as file",
                    param="file",
                )
            if isinstance(uploads[0], str):
                raise _no_filename("file")
            data, name = await uploads[0].read(), uploads[0].filename or "picture"
            [purpose, *others] = form.getlist("purpose") or ["vision"]
            if others:
                raise _duplicate_field("purpose")
            if not isinstance(purpose, str):
                raise _not_text("purpose")
        image = await self._service.run_in_worker(self._service.reader().file, data)
        # The name is shown and never used as a path.
        file = self._service.files.add(data, media_type(data), image, name[:200], purpose[:40])
        return JsonReply(file.as_json)

    async def file(self, file_id: str) -> Response:
        return JsonReply(self._service.files.get(file_id).as_json)

    async def content(self, file_id: str) -> Response:
        file = self._service.files.get(file_id)
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(file.data, media_type=file.media_type, headers=headers)

    async def delete_file(self, file_id: str) -> Response:
        self._service.files.delete(file_id)
        return JsonReply({"id": file_id, "object": "file", "deleted": True})

    async def response(self, response_id: str, request: Request) -> Response:
        for name in request.query_params:
            raise ApiError(
                400,
                f"{name[:60]}: a stored response is given as it is, in one piece: leave it out",
                param=name[:60],
                code="unknown_field",
            )
        return JsonReply(self._service.conversations.get(response_id).response)

    async def delete_response(self, response_id: str) -> Response:
        self._service.conversations.delete(response_id)
        return JsonReply({"id": response_id, "object": "response", "deleted": True})

    async def models(self) -> Response:
        return JsonReply({"object": "list", "data": self._service.model_objects})

    async def model(self, name: str) -> Response:
        self._service.check_model(name)
        return JsonReply(self._service.model_object(name))

    async def health(self) -> Response:
        """Status 200 if the engine runs, and is neither stuck in a step nor fails in each."""
        driver = self._service.driver
        silent, reason = round(driver.silent_seconds, 3), driver.start_error
        if not reason and not driver.healthy:
            reason = "the engine's last steps failed, or its thread has ended: see the log"
        if not reason and silent >= STALE_SECONDS:
            reason = f"the engine has made no step for {silent:.0f} s: it may be stuck in one"
        content = {"status": "failing" if reason else "ok", "engine_silent_seconds": silent}
        content |= {"reason": reason} if reason else {}
        return JsonReply(content, 503 if reason else 200)

    async def ready(self) -> Response:
        """Whether requests are accepted."""
        driver = self._service.driver
        is_ready = driver.ready and not driver.draining and driver.healthy
        return JsonReply({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    # --- bodies ---

    async def _body(self, request: Request, model: type[Body]) -> tuple[Body, dict[str, str]]:
        """The body, and headers that list its ignored fields. Raises `ApiError`."""
        content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Web pages of other servers may send other types without a CORS preflight request.
        if content != "application/json":
            raise ApiError(415, "the body is not JSON: send Content-Type: application/json")
        _check_encoding(request)
        raw = await request.body()
        # Millions of values take seconds to parse, during which no other thread runs. Texts also
        # have commas, but only `MAX_CHARACTERS` of them can fit a prompt.
        limit = model.max_values + MAX_CHARACTERS
        if raw.count(b",") > limit:
            raise ApiError(
                400,
                f"the body has over {limit:,} commas, the limit: send fewer values or shorter "
                "texts",
                code="invalid_value",
            )
        data = (
            await self._service.run_in_worker(_parse_json, raw)
            if len(raw) > _LARGE_JSON
            else _parse_json(raw)
        )
        body, ignored = read(model, data, self._options.lenient)
        return body, _ignored_header(ignored)

    async def _form(
        self, request: Request, model: type[Body]
    ) -> tuple[Body, dict[str, str], list[bytes]]:
        """As `_body` for a form, with its images in order."""
        form = await _read_form(request)
        async with _closing(form):
            fields: dict[str, Any] = {}
            files: list[bytes] = []
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name in _IMAGE_FIELDS:
                    files.append(await value.read())
                elif isinstance(value, UploadFile) and name in model.model_fields:
                    raise _not_text(name)
                elif isinstance(value, UploadFile):
                    fields[name] = "a file"  # which `read` refuses, with the reason
                elif name in _IMAGE_FIELDS:
                    raise _no_filename(name)
                elif name in fields:
                    raise _duplicate_field(name)
                else:
                    fields[name] = value
        body, ignored = read(model, fields, self._options.lenient, text=True)
        return body, _ignored_header(ignored), files


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        wrong = f"is not valid JSON at line {error.lineno}, column {error.colno}: correct it there"
    except UnicodeDecodeError:
        wrong = "is not UTF-8: encode it so"
    except RecursionError:
        wrong = "is nested too deeply: use fewer levels"
    except ValueError:  # Python limits the digits of integers
        wrong = f"has a number of over {sys.get_int_max_str_digits():,} digits: use fewer"
    raise ApiError(400, f"the body {wrong}", code="invalid_json")


def _parse_float(digits: str) -> float:
    number = float(digits)
    if isinf(number):  # a reply could not repeat it, as JSON has no infinity
        raise ApiError(
            400, f"the number {digits[:40]} is too large: use one below 1e308", code="invalid_json"
        )
    return number


def _refuse_constant(name: str) -> float:
    """Raise `ApiError` for NaN or Infinity."""
    raise ApiError(
        400, f"{name} is not JSON: use a number, or leave the field out", code="invalid_json"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # one of two values would be ignored
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _duplicate_field(name)
    return fields


def _check_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ApiError(
            415,
            f"Content-Encoding {encoding[:40]!r} is not read: send the body uncompressed",
            code="content_encoding",
        )


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_form(request: Request) -> FormData:
    if not _is_form(request):
        raise ApiError(415, "the file is sent as a form: use multipart/form-data")
    _check_encoding(request)
    try:
        return await request.form(
            max_files=_MAX_FORM_FIELDS,
            max_fields=_MAX_FORM_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
    except HTTPException as error:
        raise ApiError(400, _form_error(str(error.detail))) from None


def _form_error(detail: str) -> str:
    """The message for an error text of starlette's form parser."""
    if detail.startswith("Too many"):
        return f"the form has over {_MAX_FORM_FIELDS} fields or files, the limit: leave some out"
    if detail.startswith("Part exceeded"):
        return (
            f"a field of the form has over {_MAX_FIELD_BYTES:,} bytes, the limit: send an image "
            "as a file, with a filename"
        )
    return "the form is malformed: send multipart/form-data"


def _duplicate_field(field: str) -> ApiError:
    message = f"the field {field[:60]} came twice: send it once"
    return ApiError(400, message, param=field[:60], code="invalid_json")


def _unknown_upload_field(field: str) -> ApiError:
    why = "it is unknown on this route: leave it out"
    if field.startswith("expires_after"):
        why = "files do not expire, but the oldest go when there is no room: delete it yourself"
    return ApiError(400, f"{field}: {why}", param=field, code="unknown_field")


def _no_filename(field: str) -> ApiError:
    message = f"the field {field} has no filename: send the image as a file, with one"
    return ApiError(400, message, param=field)


def _not_text(field: str) -> ApiError:
    remedy = "send it as image" if field == "images" else "send it as text, without a filename"
    return ApiError(400, f"the field {field} is a file: {remedy}", param=field)


@asynccontextmanager
async def _closing(form: FormData) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()


def _ignored_header(ignored: list[str]) -> dict[str, str]:
    """The header that lists the ignored fields, if there are any."""
    names = ", ".join(ignored).encode("ascii", "backslashreplace").decode()  # headers are ASCII
    return {IGNORED_HEADER: names[:1000]} if ignored else {}


_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _replies_schema(path: str, streams: bool) -> dict[str, Any]:
    """OpenAPI's description of the replies and errors of a route."""
    any_object: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path == "/metrics":
        reply: dict[str, Any] = {"text/plain": {}}
    elif path.endswith("/content"):
        reply = {"image/*": {}}
    else:
        reply = any_object | ({"text/event-stream": {}} if streams else {})
    error = {"application/json": {"schema": {"$ref": _component("Error")}}}
    if path in ("/health", "/ready"):
        error = any_object
    return {
        "200": {"description": "The reply", "content": reply},
        "default": {"description": "An error", "content": error},
    }


def _component(name: str) -> str:
    return f"#/components/schemas/{name}"


def _openapi(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's description, completed: with the schemas that the bodies refer to, the schema of
    errors, and the replies of all routes."""
    description = make()
    schemas = description.setdefault("components", {})["schemas"] = {"Error": _ERROR_SCHEMA}
    for path, methods in description["paths"].items():
        for method in methods.values():
            method["responses"] = _replies_schema(
                path, streams="requestBody" in method and "tokenize" not in path
            )
            for content in method.get("requestBody", {}).get("content", {}).values():
                schemas.update(content["schema"].get("$defs", {}))
                content["schema"] = {k: v for k, v in content["schema"].items() if k != "$defs"}
    return description
