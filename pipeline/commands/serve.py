"""The GGUF behind OpenAI's protocol on this machine: llama-cpp-python's server, with errors in streams.

Otherwise that server ends a stream that fails, as where the prompt is too long, without a word, and a new request ends
the stream of another one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.errors import Fail
from pipeline.models.gguf_header import read_header
from pipeline.scoring.scorer import N_UBATCH, number


def send_errors_in_streams(app: Any, handler: Any) -> None:
    """Let a stream of the module `app` end with the error that `handler` makes of an exception.

    `handler` is the class that makes the answer to a request without a stream. OpenAI's client raises such an error.
    """
    publish = app.get_event_publisher

    async def publisher(*, llama_call: Callable[..., Iterator[Any]], body: Any, **options: Any) -> None:
        def chunks(*args: Any, **settings: Any) -> Iterator[Any]:
            try:
                yield from llama_call(*args, **settings)
            except Exception as error:
                yield {"error": handler.error_message_wrapper(handler, error, body)[1]}

        await publish(llama_call=chunks, body=body, **options)

    app.get_event_publisher = publisher  # looked up for each request


def main(
    gguf: Annotated[Path, typer.Option(metavar="FILE", help="The model.")] = Path("models/medical-reasoner.gguf"),
    host: Annotated[str, typer.Option(help="127.0.0.1 lets only this machine in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="http://HOST:PORT/v1 is the address for clients.")] = 8000,
    n_ctx: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer together.")] = 2048,
) -> None:
    """Serve until Ctrl-C."""
    about = read_header(gguf).metadata
    try:
        import uvicorn
        from llama_cpp.server import app
        from llama_cpp.server.errors import RouteErrorHandler
        from llama_cpp.server.settings import ModelSettings, ServerSettings
    except ImportError as error:
        raise Fail(f"the server needs the package {error.name}; run this in a .venv made without GPU=1") from None
    send_errors_in_streams(app, RouteErrorHandler)
    model = ModelSettings(
        model=str(gguf),
        n_ctx=min(n_ctx, about[f"{about['general.architecture']}.context_length"]),
        n_ubatch=N_UBATCH,
        n_gpu_layers=number("N_GPU_LAYERS", 999),
        verbose=False,
    )
    settings = ServerSettings(host=host, port=port, interrupt_requests=False)
    try:
        served = app.create_app(server_settings=settings, model_settings=[model])
    except ValueError:  # all that llama-cpp-python says when llama.cpp returns no model or no context
        raise Fail(
            f"{gguf} cannot be loaded: it is damaged, or memory is short; set N_GPU_LAYERS=0 or a lower --n-ctx"
        ) from None
    uvicorn.run(served, host=host, port=port)
