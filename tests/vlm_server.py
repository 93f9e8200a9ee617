"""A small vision-language model on the loopback interface: OpenAI's protocol, answers from looking at the
picture, and mischief on request."""
import base64
import io
import json
import pickle
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from ddpo_nb.emoji_sd import COLOURS

MODEL = "emoji-eye"

def background(picture):
    "The name of the colour nearest to the picture's rim"
    p = np.asarray(picture.convert("RGB"), dtype=float)
    rim = np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]]).mean(0)
    return min(COLOURS, key=lambda c: np.square(rim - COLOURS[c]).sum())

def see(picture, question):
    colour = background(picture)
    if "colour" in question: return f"It is {colour}."
    if "How many" in question: return "There are three of them."
    return f"something on a {colour} background"

class Trap:
    "A pickle of this, once loaded, writes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (self.path, "w"))

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    def __init__(self, see=see, port=0):
        self.see, self.gone, self.plan, self.requests, self.pause = see, False, [], [], 0.
        self.trap, self.says, self.answers_left, self.in_flight, self.most, self.lock = (
            "", "", None, 0, 0, threading.Lock()
        )
        self.doom = lambda picture, question: None  # an act for these, whatever the plan says
        self.refuse = lambda asked: None            # (status, what is said) to requests that it does not like
        super().__init__(("127.0.0.1", port), Handler)
    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"
    @property
    def questions(self):
        return [
            json.loads(body)["messages"][0]["content"][0]["text"]
            for method, _, _, body in self.requests
            if method == "POST"
        ]
    def handle_error(self, request, client_address): pass  # clients that hang up are part of the game
    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
        self.thread.start()
        return self
    def leave(self):
        "Gone: no new connections, and those that are open are dropped"
        if not self.gone: self.gone = True; self.shutdown(); self.server_close(); self.thread.join()
    def __exit__(self, *args): self.leave()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def send(self, data, status=200, cut=None, **headers):
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None: self.close_connection = True

    def do_GET(self):
        s = self.server
        s.requests.append(("GET", self.path, dict(self.headers), b""))
        act = s.plan.pop(0) if s.plan else ""
        if act: return self.misbehave(act, {})
        (
            self.send(
                dict(object="list", data=[dict(id=MODEL, object="model"), dict(id="other", object="model")])
            )
            if self.path == "/v1/models"
            else self.send(dict(error="no such page"), 404)
        )

    def do_POST(self):
        s, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if s.gone: self.close_connection = True; return
        with s.lock:
            s.requests.append(("POST", self.path, dict(self.headers), body))
            s.in_flight += 1; s.most = max(s.most, s.in_flight)
            act = s.plan.pop(0) if s.plan else ""
        try:
            if s.pause: time.sleep(s.pause)
            self.answer(json.loads(body), act)
        finally:
            with s.lock: s.in_flight -= 1

    def answer(self, asked, act):
        s = self.server
        if self.path.partition("?")[0] != "/v1/chat/completions":
            return self.send(dict(error=dict(message="no such page")), 404)
        if asked["model"] != MODEL:
            return self.send(
                dict(error=dict(message=f"The model `{asked['model']}` does not exist.", code=404)), 404
            )
        text, picture = (part[part["type"]] for part in asked["messages"][0]["content"])
        kind, _, data = picture["url"].partition(",")
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        if refused := s.refuse(asked): return self.send(refused[1], refused[0])
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        good = dict(
            id="1", object="chat.completion", model=MODEL,
            choices=[
                dict(
                    index=0, finish_reason="stop",
                    message=dict(role="assistant", content=s.see(picture, text))
                )
            ],
        )
        act = s.doom(picture, text) or act
        if act: return self.misbehave(act, good)
        if s.answers_left is not None:
            with s.lock: s.answers_left -= 1; dead = s.answers_left < 0
            if dead: self.close_connection = True; return
        self.send(good)

    def misbehave(self, act, good):
        name, _, value = act.partition(":")
        whole = json.dumps(good).encode()
        if name.isdigit():
            return self.send(
                dict(error=dict(message=self.server.says or "in a bad mood")), int(name),
                **(dict(Retry_After=value) if value else {})
            )
        if name == "slow": time.sleep(float(value)); return self.send(good)
        if name == "garbage": return self.send(b"<html><h1>Welcome!</h1></html>")
        if name == "binary": return self.send(bytes(range(256)))
        if name == "pickle":
            return self.send(pickle.dumps(Trap(self.server.trap)), Content_Type="application/python-pickle")
        if name == "empty": return self.send(b"")
        if name == "deep": return self.send(b"[" * 200_000)
        if name == "cut": return self.send(whole, cut=len(whole) // 2)
        if name == "hangup": self.close_connection = True; return
        if name == "nothttp":
            self.close_connection = True
            return self.wfile.write(b"220 mail.example.org ESMTP\r\n")
        if name == "error200": return self.send(dict(error=dict(message=self.server.says or "no such slot")))
        if name == "json": return self.send(json.loads(value))
        if name == "moved": return self.send(b"", int("307"), Location=value)
        if name == "huge": return self.send(b" " * (2 << 20) + whole)
        if name == "reset":  # in the middle of the body, and rudely
            self.send_response(200); self.send_header("Content-Length", str(len(whole))); self.end_headers()
            self.wfile.write(whole[:20]); self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if name == "drip":  # a header that never ends
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            for _ in range(400): self.wfile.write(b"."); self.wfile.flush(); time.sleep(.02)
            return
        if name in ("endless", "dribble"):
            self.close_connection = True
            self.send_response(200); self.send_header("Content-Length", "1000000000"); self.end_headers()
            for _ in range(200 if name == "dribble" else 20_000):
                self.wfile.write(b" " if name == "dribble" else b" " * 65536)
                if name == "dribble": self.wfile.flush(); time.sleep(.02)
            return
        raise ValueError(act)
