"""A mock of vLLM's completions that computes with transformers, one request at a time."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.answer_text import AnswerText


class Mock:
    """What a vLLM with `--enable-prompt-embeds` does, one request at a time.

    Args:
        llm: the LLM.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.embeds: list[torch.Tensor] = []
        self.status = 200
        self.pause = 0.0
        self.written = 0
        self.change: Callable[[Iterator[Any]], Iterator[Any]] = iter
        self._lock = threading.Lock()

    def complete(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert asked["model"] == "llm" and asked["stream"] and "prompt" not in asked
        data = io.BytesIO(base64.b64decode(asked["prompt_embeds"], validate=True))
        embeds = torch.load(data, weights_only=True)
        assert embeds.ndim == 2 and embeds.is_floating_point()
        with self._lock, torch.no_grad():
            self.embeds.append(embeds)
            tokens = self.llm.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones((1, len(embeds)), dtype=torch.int64),
                max_new_tokens=asked["max_tokens"],
                do_sample=False,
                eos_token_id=asked["stop_token_ids"],
                pad_token_id=0,
            )[0].tolist()
        text = AnswerText(load_toy_tokenizer(), asked["stop"])
        count = 0
        while count < len(tokens) and not text.stopped:
            time.sleep(self.pause)
            yield {"choices": [{"text": text.add(tokens[count]), "finish_reason": None}]}
            count += 1
        yield {"choices": [{"text": text.finish(), "finish_reason": None}]}
        stopped = text.stopped or tokens[-1] in asked["stop_token_ids"]
        yield {"choices": [{"text": "", "finish_reason": "stop" if stopped else "length"}]}
        yield {"choices": [], "usage": {"completion_tokens": count}}


@contextmanager
def run_mock(mock: Mock, protocol: str = "HTTP/1.0") -> Iterator[str]:
    """Run a mock; yields the address of its interface.

    Args:
        mock: the mock.
        protocol: HTTP/1.0 ends an answer by closing the connection, HTTP/1.1 sends it in chunks.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def do_GET(self) -> None:
            self.send_response(200)
            content = json.dumps({"data": [{"id": "llm"}]}).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(mock.status)
            if protocol == "HTTP/1.1":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if mock.status != 200:
                self.write_event(b"")
                return
            for event in mock.change(mock.complete(asked)):
                self.write_event(f"data: {json.dumps(event)}\n\n".encode())
                mock.written += 1
            self.write_event(b"data: [DONE]\n\n")
            self.write_event(b"")

        def write_event(self, data: bytes) -> None:
            chunk = b"%x\r\n%b\r\n" % (len(data), data)
            self.wfile.write(chunk if protocol == "HTTP/1.1" else data)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a client that left
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
