"""A server as an arm: what is asked of it, and each of its faults in a sentence."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from eagle_lab.engines.arm import parse
from eagle_lab.engines.protocol import EngineFailed, Limits
from eagle_lab.engines.server import Server
from eagle_lab.measure.records import read
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.record import ComparisonRecord

TEXT, IDS = Prompt("a", "own", "Why?", (1, 2)), Prompt("b", "own", "", (3, 4))
WORDS = ["The ", "sky ", "is ", "blue."]


class Handler(BaseHTTPRequestHandler):
    """Streams WORDS as a server does; `server.faults` says what it does wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, text, kind="application/json"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        key, given = self.server.faults.get("key"), self.headers.get("Authorization")
        if key and given != f"Bearer {key}":
            self.answer(401, json.dumps({"error": f"bad key {given}"}))
            return True
        return False

    def do_GET(self):
        if self.refused():
            return
        faults = self.server.faults
        if self.path == "/metrics" and faults.get("metrics"):
            drafts, accepted = self.server.counts
            name = 'vllm:spec_decode_num_{}_total{{engine="0",model_name="m"}} {}'
            self.answer(
                200,
                "\n".join(
                    [name.format("drafts", float(drafts)), name.format("accepted_tokens", float(accepted))]
                ),
            )
        elif self.path == "/v1/models":
            self.answer(200, faults.get("models", json.dumps({"data": [{"id": "m"}]})))
        else:
            self.answer(404, "no")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.server.asked.append((self.path, asked))
        faults = self.server.faults
        if faults.get("dies_after", 99) < len(self.server.asked):
            return self.answer(503, "no workers left")
        if "status" in faults:
            return self.answer(faults["status"], faults.get("said", "it broke"))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for at, word in enumerate(WORDS):
            if at == faults.get("cut_at"):
                self.close_connection = True
                return
            if at == faults.get("slow_at"):
                time.sleep(3)
            time.sleep(faults.get("drip", 0))
            for _ in range(faults.get("pings", 0)):
                time.sleep(0.2)
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
            if at == faults.get("nonsense_at"):
                self.wfile.write(b"data: {oops\n\n")
            if at == faults.get("odd_at"):
                self.send(faults["odd"])
            if at == faults.get("error_at"):
                self.send({"error": {"message": "out of memory"}})
            choice = (
                {"text": word}
                if self.path.endswith("/completions") and "chat" not in self.path
                else {"delta": {"content": word}}
            )
            self.send({"choices": [choice | {"finish_reason": "stop" if at == len(WORDS) - 1 else None}]})
        if not faults.get("no_usage"):
            self.send({"choices": [], "usage": {"completion_tokens": 6}})
        more = faults.get("counted", (2, 3))
        self.server.counts = (self.server.counts[0] + more[0], self.server.counts[1] + more[1])
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def send(self, piece):
        self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def serve(monkeypatch):
    """A server with faults, and an arm's client of it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    served.faults, served.asked, served.counts = {}, [], (10, 10)
    threading.Thread(target=served.serve_forever, daemon=True).start()

    def client(more="", **faults):
        served.faults = faults
        arm = parse(f"engine=openai,url=http://127.0.0.1:{served.server_port}/v1{more}")
        return Server(arm, arm.target or None, Limits(start=5, decode=1.0, first=10))

    client.served = served
    yield client
    served.shutdown()
    served.server_close()


def test_a_streamed_answer_has_its_times_and_tokens(serve):
    with serve(more=",temperature=0.5,top_k_sampling=3") as server:
        found = server.decode(TEXT, 8, 7)
    assert (found.text, found.new_tokens, found.counts) == ("".join(WORDS), 6, None)
    assert found.first_token_seconds == found.arrivals_s[0] <= found.arrivals_s[-1] == found.seconds
    ((path, body),) = serve.served.asked
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "Why?"}]
    wanted = {
        "model": "m", "max_tokens": 8, "temperature": 0.5, "top_p": 1.0, "top_k": 3, "seed": 7,
        "stream": True,
    }  # fmt: skip
    assert body | wanted == body


def test_token_ids_and_conversations(serve):
    with serve() as server:
        assert server.decode(IDS, 8, None).text == "".join(WORDS)
        server.decode(Prompt("c", "own", ("Hi", "Hello", "Why?"), (1,)), 8, None)
    (path, body), (_, chat) = serve.served.asked
    assert path == "/v1/completions" and body["prompt"] == [3, 4]
    assert [turn["role"] for turn in chat["messages"]] == ["user", "assistant", "user"]


def test_cycles_are_the_server_s_own_count(serve):
    with serve(metrics=True) as server:
        assert server.counts and server.decode(TEXT, 8, None).counts == (2, 5)
    with serve(metrics=True, counted=(-12, -13)) as server:  # it was started anew
        assert server.decode(TEXT, 8, None).counts is None


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"slow_at": 2}, "sent nothing for 1 s"),
        ({"drip": 0.4}, "did not end its answer in time"),
        ({"pings": 8}, "did not end its answer in time"),
        ({"cut_at": 0}, "cut its answer after 0 pieces"),
        ({"cut_at": 3}, "cut its answer after 3 pieces"),
        ({"status": 500}, "answered 500: it broke"),
        ({"status": 400, "said": "no such model"}, "answered 400: no such model"),
        ({"nonsense_at": 1}, "streams '{oops', which is no JSON object"),
        ({"error_at": 1}, "ended its answer with an error: .*out of memory"),
        ({"no_usage": True}, "does not tell how many tokens"),
        ({"odd_at": 1, "odd": {"choices": [None]}}, "which is no piece of a completion"),
        ({"odd_at": 1, "odd": {"choices": 5}}, "which is no piece of a completion"),
        ({"odd_at": 1, "odd": {"choices": [], "usage": "much"}, "no_usage": True}, "does not tell how many tokens"),
    ],
)  # fmt: skip
def test_faults_of_an_answer(serve, faults, message):
    with serve(**faults) as server, pytest.raises(EngineFailed, match=message):
        server.decode(TEXT, 8, None)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ('{"data": []}', "lists 0 models; name one as target"),
        ('{"data": [{"id": "a"}, {"id": "b"}]}', "lists 2 models: a, b; name one as target"),
        ("<html>", "lists no models, so name one as target"),
    ],
)  # fmt: skip
def test_the_model_is_named_where_the_server_has_not_just_one(serve, models, message):
    with pytest.raises(EngineFailed, match=message):
        serve(models=models)
    with serve(models=models, more=",target=b") as server:
        assert server.model == "b"


def test_the_key_comes_from_the_environment_and_into_no_sentence(serve, monkeypatch):
    with pytest.raises(EngineFailed, match="needs a key; set OPENAI_API_KEY"):
        serve(key="secret")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(EngineFailed, match="refuses the key in OPENAI_API_KEY") as refused:
        serve(key="secret")
    assert "wrong" not in str(refused.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serve(key="secret") as server:
        assert server.decode(TEXT, 8, None).new_tokens == 6
    with (
        serve(key="secret", status=500, said="your key secret is odd") as server,
        pytest.raises(EngineFailed, match="your key … is odd"),
    ):
        server.decode(TEXT, 8, None)


def test_an_address_that_is_none():
    with pytest.raises(EngineFailed, match="url is 'http://127.0.0.1:80a/v1', which is no address"):
        Server(parse("engine=openai,url=http://127.0.0.1:80a/v1"), None)


def test_a_dead_server(serve):
    serve.served.shutdown()
    serve.served.server_close()
    with pytest.raises(EngineFailed, match="no server answers at http://127.0.0.1"):
        serve()


def test_finished_pairs_of_a_server_that_fails_are_kept(tiny_pair, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_lab.measure.outside.foreign_load", lambda *_: 0.0)
    # ids as words: this pair has no tokenizer, and what the server says isn't the question here
    words = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    with serve(dies_after=7) as server:
        with pytest.raises(EngineFailed, match="answered 503: no workers left"):
            for _ in range(8):
                server.decode(IDS, 8, None)
        serve.served.asked.clear()
        # two warm up, two are checked, two pairs are timed but for the last decode
        done = compare(
            replace(tiny_pair, tokenizer=words), baseline=f"engine=openai,url={server.url}", candidate="top_p=0.9",
            prompts=[[1, 124, 306], [1, 245, 323]], iterations=2, forks=1, max_new_tokens=8, progress=False,
            results_dir=tmp_path,
        )  # fmt: skip
    record = read(done.path, ComparisonRecord)
    assert len(record.samples) == 1 and [event.fork for event in record.events] == [0]
    assert "answered 503: no workers left" in record.events[0].said
