"""A child process that says hello and waits: it starts fast, as it imports nothing."""

from __future__ import annotations

from multiprocessing.connection import Connection


def run(connection: Connection, hello: bytes) -> None:
    connection.send_bytes(hello)
    try:
        connection.recv_bytes()
    except EOFError:
        pass
