"""`transformers serve` as an arm: the text of plain decoding, its times, and a comparison beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from make import interpreter

import eagle_lab
from eagle_lab.engines.arm import parse
from eagle_lab.engines.here import base_arm
from eagle_lab.engines.opened import opened
from eagle_lab.measure import outside
from eagle_lab.models.prompts import prepare
from eagle_lab.models.targets import embedded_target

TOKENS = 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    interpreter("serve")
    return eagle_lab.load(dtype="float32", device="cpu", verbose=False)


@pytest.fixture(scope="module")
def url(pair, tmp_path_factory):
    """A server of the embedded target on loopback, ended with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w")
    program = interpreter("serve").with_name("transformers")
    command = [
        program, "serve", embedded_target(), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
        "--dtype", "float32",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(180):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, "the server ended"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()
        log.close()


def test_its_text_is_plain_decoding_s(pair, url):
    arm = parse(f"engine=openai,url={url},target={embedded_target()}", base_arm(pair))
    prompts = prepare(pair.tokenizer, "heldout")[:2]
    with opened(pair, arm, 400) as server:
        assert server.process is not None  # so that its load is not foreign
        found = [server.decode(prompt, TOKENS, None, True) for prompt in prompts]
    for prompt, one in zip(prompts, found, strict=True):
        plain = eagle_lab.generate_plain(pair, prompt.ids, TOKENS).tokens
        assert one.text == pair.tokenizer.decode(plain, skip_special_tokens=True)
        assert one.new_tokens == TOKENS and 0 < one.first_token_seconds < one.seconds
        assert one.counts is None  # it has no draft, and tells nothing


def test_a_comparison_with_it(pair, url, tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "foreign_load", lambda *_: 0.0)
    done = eagle_lab.compare(
        pair, baseline="plain", candidate=f"engine=openai,url={url},target={embedded_target()}", iterations=2, forks=1,
        max_new_tokens=TOKENS, results_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert done.record.settings.rule == "time per token" and done.verdict.pairs == 2
    assert done.record.correctness.baseline is None and done.record.correctness.candidate is None
    assert not any(sample.difference for sample in done.record.samples)
