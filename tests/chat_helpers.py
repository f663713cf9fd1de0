"""A scripted OpenAI-compatible server, for tests of what a chat model does with every kind of answer."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]
KEY = "sk-secret-4f1d"
HANG_UP = 0  # in place of a status: the server closes the connection without a word


@dataclass
class Drip:
    """In place of a body: a byte at a time, with a pause behind each."""

    body: Any
    seconds: float


@dataclass
class CutShort:
    """In place of a body: its first half, after which the connection is closed."""

    body: Any


def completion(content: Any, *, role: str | None = "assistant", usage: dict[str, int] | None = None) -> Reply:
    return 200, {"choices": [{"index": 0, "message": {"role": role, "content": content}}], "usage": usage}


@dataclass
class ScriptedServer:
    """Answers with the next reply of its script (the last one for ever), and keeps what it was asked."""

    url: str = ""
    script: list[Reply | Callable[[dict[str, Any]], Reply]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    delay: float = 0.0
    stop: Callable[[], None] = lambda: None
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Runs one on loopback, and lets huggingface_hub reach it: offline, as the suite is, it keeps even from there."""
    scripted = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with scripted.lock:
                scripted.bodies.append(body)
                scripted.headers.append({key.lower(): value for key, value in self.headers.items()})
                scripted.paths.append(self.path)
                step = scripted.script.pop(0) if len(scripted.script) > 1 else scripted.script[0]
                scripted.active += 1
                scripted.most_active = max(scripted.most_active, scripted.active)
            time.sleep(scripted.delay)
            status, content, *more = step(body) if callable(step) else step
            body = content.body if isinstance(content, Drip | CutShort) else content
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            with scripted.lock:
                scripted.active -= 1
            if status == HANG_UP:
                return
            try:
                self.send_response(status)
                for key, value in (more[0] if more else {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if isinstance(content, Drip):
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(content.seconds)
                else:
                    self.wfile.write(data[: len(data) // 2] if isinstance(content, CutShort) else data)
            except OSError:
                pass  # a client that had enough of waiting

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scripted.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

    scripted.stop = stop
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            yield scripted
    finally:
        huggingface_hub.close_session()
        stop()
