"""`handmill serve`: model folders behind a REST interface on this machine."""

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from handmill import families, folder
from handmill.errors import UserError, optional
from handmill.folder import Model

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(paths: Sequence[Path | str], host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve model folders until interrupted; a model's name is its folder's. Port 0 takes a free one.

    Raises UserError when a folder does not load, does not answer as its receipt says or makes nothing by itself, when
    two have one name, and when the port is in use.
    """
    optional("fastapi", "serve")
    uvicorn = optional("uvicorn", "serve")
    from handmill.serving.rest import create_app

    models = load(paths)
    with bind(host, port) as listening:
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        if host not in LOOPBACK:
            print(f"warning: whoever reaches {host} can use these models without a password", file=sys.stderr)
        print(f"serving {', '.join(models)} at {address}/v1, described at {address}/docs; Ctrl-C ends it",
              file=sys.stderr, flush=True)
        hosts = ("127.0.0.1", "localhost", "[::1]") if host in LOOPBACK else ("*",)
        app = create_app(models, hosts=hosts)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)  # seconds
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def load(paths: Sequence[Path | str]) -> dict[str, Model]:
    """The models of the folders by name, each one verified. Raises UserError."""
    models: dict[str, Model] = {}
    for path in paths:
        name = Path(path).resolve().name
        if name in models:
            raise UserError(f"{path} and {models[name].path} would both be named {name!r}: rename one folder")
        models[name] = folder.load(path)
        verify(models[name])
    if not models:
        raise UserError("name at least one model folder to serve")
    return models


def verify(model: Model) -> None:
    """Compare the loaded network with the answer that training left in the receipt, where it did.

    Raises UserError when they differ, and for an autoencoder of codes, which makes nothing by itself.
    """
    if model.recipe.family == "variational" and model.recipe.network.bottleneck != "gaussian":
        raise UserError(f"{model.path} is an autoencoder of codes, which has nothing to draw them from: serve a model "
                        "that was trained on its codes")
    if not families.faithful(model.network, model.recipe, model.receipt["training"].get("witness", {})):
        raise UserError(f"{model.path} does not answer as its receipt says the trained network did, so it "
                        "is not served: copy the folder again from where it was made, or train again")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises UserError naming what keeps it from being bound."""
    try:
        if not 0 <= port <= 65535:  # which getaddrinfo would take modulo 65536
            raise OverflowError
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError, OverflowError):
        raise UserError(f"{host}:{port} is no address here: --host takes an address of this machine, and "
                        "--port a number up to 65535") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()  # a second server on the port fails from here on
    except OSError as error:
        listening.close()
        raise UserError(f"port {port} of {host} cannot be used ({error}): end what has it, or choose "
                        "another with --port") from None
    return listening
