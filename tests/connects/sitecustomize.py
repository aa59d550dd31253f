"""On PYTHONPATH, notes every address that a Python process looks up or connects to in the file CONNECTS."""

import os
import sys
from pathlib import Path
from typing import Any


def watch(event: str, args: tuple[Any, ...]) -> None:
    address = args[1] if event == "socket.connect" else args[0] if event == "socket.getaddrinfo" else None
    if event == "socket.sendto":
        address = args[1]
    if (address is not None and not isinstance(address, str | bytes)) or event == "socket.getaddrinfo":
        with Path(os.environ["CONNECTS"]).open("a") as file:
            file.write(f"{event} {address} {sys.orig_argv[1:4]}\n")


if "CONNECTS" in os.environ:
    sys.addaudithook(watch)
