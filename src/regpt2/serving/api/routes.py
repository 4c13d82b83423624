"""The routes of OpenAI's API. In: the models; out: routes."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from regpt2.serving.api.answering import Stream, WholeAnswer
from regpt2.serving.api.asking import model_named
from regpt2.serving.api.chat import read_chat
from regpt2.serving.api.completions import read_completions
from regpt2.serving.api.errors import JSON, as_api_error, error_answer
from regpt2.serving.api.fields import read_body
from regpt2.serving.models import Models, Served

Endpoint = Callable[[Request], Awaitable[Response]]


def api_routes(models: Models) -> list[Route]:
    """/v1/models, /v1/completions, /v1/chat/completions."""

    async def list_models(_: Request) -> Response:
        return JSON({"object": "list", "data": [model_object(one) for one in models.values()]})

    async def one_model(request: Request) -> Response:
        return JSON(model_object(model_named(request.path_params["name"], models)))

    async def completions(request: Request) -> Response:
        form = await read_completions(read_body(await request.body()), models)
        return Stream(form) if form.ask.stream else WholeAnswer(form)

    async def chat(request: Request) -> Response:
        form = await read_chat(read_body(await request.body()), models)
        return Stream(form) if form.ask.stream else WholeAnswer(form)

    return [
        Route("/v1/models", _answering(list_models), methods=["GET"]),
        Route("/v1/models/{name:path}", _answering(one_model), methods=["GET"]),
        Route("/v1/completions", _answering(completions), methods=["POST"]),
        Route("/v1/chat/completions", _answering(chat), methods=["POST"]),
    ]


def model_object(served: Served) -> dict[str, object]:
    """A model in OpenAI's form, and what else a page may want to know."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "regpt2",
        "context_length": served.context,
        "parameters": served.loaded.model.n_params(),
        "vocab_size": served.tokenizer.vocab_size,
        "chat": served.chats,
    }


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint with errors in OpenAI's form. Those of a body that does not come are not ours: they pass."""

    async def answered(request: Request) -> Response:
        await request.body()
        try:
            return await endpoint(request)
        except Exception as error:
            return error_answer(as_api_error(error))

    return answered
