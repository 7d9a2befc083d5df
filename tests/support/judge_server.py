"""An OpenAI-compatible endpoint in a process of its own: ``python -m tests.support.judge_server``; prints its port.

It grades 0.75 what holds "good", else 0. Words in the completion make it misbehave: FLAKY fails twice before it
answers, BROKEN always fails, SLOW answers after two seconds, RAMBLING gives no score, VAGUE only when asked again, CUT
ends at the longest reply. ``GET /seen`` counts.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "secret"
lock = threading.Lock()
seen = {"requests": 0, "at_once": 0, "most_at_once": 0}
failures: dict[str, int] = {}


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/seen":
            self.reply(200, seen)
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            self.reply(401, {"error": {"message": "wrong key"}})
        else:
            self.reply(200, {"object": "list", "data": [{"id": "grader", "object": "model"}]})

    def do_POST(self) -> None:
        with lock:
            seen["requests"] += 1
            seen["at_once"] += 1
            seen["most_at_once"] = max(seen["most_at_once"], seen["at_once"])
        try:
            self.judge(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        finally:
            with lock:
                seen["at_once"] -= 1

    def judge(self, request: dict) -> None:
        text = request["messages"][0]["content"]
        time.sleep(2.0 if "SLOW" in text else 0.05)
        failures[text] = failures.get(text, 0) + 1
        if "BROKEN" in text or ("FLAKY" in text and failures[text] <= 2):
            self.reply(503, {"error": {"message": "overloaded"}})
            return
        answer = "no idea" if "RAMBLING" in text else f"Well.\nScore: {0.75 if 'good' in text else 0}"
        if "VAGUE" in text and len(request["messages"]) == 1:
            answer = "Score: -1"
        reason = "length" if "CUT" in text else "stop"
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": answer}}
        self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "grader", "choices": [choice]})

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    print(server.server_address[1], flush=True)
    server.serve_forever()
