"""A server that speaks OpenAI's HTTP interface, as an arm: streamed, so that the first token and each piece have a time.

A prompt with a text goes to /chat/completions, where the server's own chat template is applied; one of token ids goes to
/completions. The key is read from OPENAI_API_KEY and kept nowhere.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import psutil

from eagle_lab.engines.arm import Arm
from eagle_lab.engines.protocol import Decoded, EngineFailed, Limits
from eagle_lab.models.prompts import Prompt

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# vLLM's counters at /metrics: cycles, and the draft tokens that they accepted
COUNTED = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")


class Server:
    """One server, held by its URL; `model` names what it serves, None for the only one that it lists.

    Raises EngineFailed, one sentence, where it can't be reached, refuses, is slow, or cuts a stream.
    """

    def __init__(self, arm: Arm, model: str | None, limits: Limits | None = None) -> None:
        self.url, self.limits, self.sampling = arm.url.rstrip("/"), limits or Limits(), arm.sampling
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise EngineFailed(f"url is {self.url!r}, which is no address: {error}.") from None
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            trust_env=host not in LOOPBACK,  # a proxy doesn't know this machine's servers
        )
        self.model = model or self._only_model()
        self.counts = self._counters() is not None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def process(self) -> int | None:
        """The process on this machine that listens at the URL's port; None for another machine's, or one that can't be seen."""
        url = httpx.URL(self.url)
        if url.host not in LOOPBACK:
            return None
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = psutil.net_connections("tcp")
        except psutil.Error:  # some systems show others' connections to root alone
            return None
        return next((c.pid for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port), None)

    def _only_model(self) -> str:
        with self._errors(self.limits.start):
            found = self.client.get(f"{self.url}/models", timeout=self.limits.start)
            self._check(found)
        try:
            names = [str(row["id"]) for row in found.json()["data"]]
        except (ValueError, TypeError, KeyError):
            raise EngineFailed(f"{self.url}/models lists no models, so name one as target.") from None
        if len(names) != 1:
            listed = f": {', '.join(names[:5])}" if names else ""
            raise EngineFailed(f"{self.url} lists {len(names)} models{listed}; name one as target.")
        return names[0]

    @contextmanager
    def _errors(self, limit: float) -> Iterator[None]:
        """What httpx raises inside becomes one sentence."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise EngineFailed(f"no server answers at {self.url}.") from None
        except httpx.TimeoutException:
            raise EngineFailed(f"{self.url} sent nothing for {limit:g} s.") from None
        except (httpx.RemoteProtocolError, httpx.ReadError):
            raise EngineFailed(f"{self.url} cut the connection.") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineFailed(f"{self.url} can't be asked: {self._safe(str(error))}.") from None

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code in (401, 403):
            said = "refuses the key in OPENAI_API_KEY" if self.key else "needs a key; set OPENAI_API_KEY"
            raise EngineFailed(f"{self.url} {said}.")
        if answer.status_code >= 400:
            answer.read()
            raise EngineFailed(f"{self.url} answered {answer.status_code}: {self._safe(answer.text)}.")

    def _safe(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self.key, "…") if self.key else text)[:200]

    def decode(self, prompt: Prompt, max_new_tokens: int, seed: int | None, first: bool = False) -> Decoded:
        """One streamed decode; `first`: the server may compile."""
        limit = self.limits.first if first else self.limits.decode
        before = self._counters() if self.counts else None
        with self._errors(limit):
            found = self._stream(prompt, max_new_tokens, seed, limit)
        if before is None or found.new_tokens == 1:
            return found
        after = self._counters() or before
        cycles, accepted = (int(b - a) for a, b in zip(before, after, strict=True))
        if cycles <= 0 or accepted < 0:  # counters start anew with their server
            return found
        return found.model_copy(update={"cycle_count": cycles, "committed": cycles + accepted})

    def _request(self, prompt: Prompt, max_new_tokens: int, seed: int | None) -> tuple[str, dict[str, Any]]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
        }  # fmt: skip
        if sampling.top_k_sampling:
            body["top_k"] = sampling.top_k_sampling
        if sampling.temperature and seed is not None:
            body["seed"] = seed
        if not prompt.text:
            return "/completions", body | {"prompt": list(prompt.ids)}
        turns = [prompt.text] if isinstance(prompt.text, str) else prompt.text
        chat = [{"role": "assistant" if at % 2 else "user", "content": turn} for at, turn in enumerate(turns)]
        return "/chat/completions", body | {"messages": chat}

    def _stream(self, prompt: Prompt, max_new_tokens: int, seed: int | None, limit: float) -> Decoded:
        path, body = self._request(prompt, max_new_tokens, seed)
        text, at, usage, ended = "", [], None, False
        start = time.perf_counter()
        with self.client.stream("POST", self.url + path, json=body, timeout=limit) as answer:
            self._check(answer)
            for piece in self._events(answer, start + limit):
                now = time.perf_counter() - start
                try:
                    usage = piece.get("usage") or usage
                    choices = piece.get("choices") or ()
                    new = "".join(
                        c.get("text") or (c.get("delta") or {}).get("content") or "" for c in choices
                    )
                    ended = ended or any(c.get("finish_reason") is not None for c in choices)
                except (AttributeError, TypeError):
                    raise EngineFailed(
                        f"{self.url} streams {self._safe(json.dumps(piece))!r}, which is no piece of a completion."
                    ) from None
                if new:
                    text += new
                    at.append(now)
        if not ended:
            raise EngineFailed(f"{self.url} cut its answer after {len(at)} pieces.")
        if not at:
            raise EngineFailed(f"{self.url} gave an answer without text.")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int) or count < 1:
            raise EngineFailed(
                f"{self.url} does not tell how many tokens its answer has (usage.completion_tokens)."
            )
        return Decoded(
            seconds=at[-1], first_token_seconds=at[0], text=text, new_tokens=count, arrivals_s=tuple(at)
        )

    def _events(self, answer: httpx.Response, deadline: float) -> Iterator[Mapping[str, Any]]:
        for line in answer.iter_lines():
            if time.perf_counter() > deadline:  # comments that keep the connection alive don't count
                raise EngineFailed(f"{self.url} did not end its answer in time.")
            if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                continue
            try:
                piece = json.loads(line[5:])
            except ValueError:
                piece = None
            if not isinstance(piece, dict):
                raise EngineFailed(f"{self.url} streams {self._safe(line[5:])!r}, which is no JSON object.")
            if piece.get("error"):
                raise EngineFailed(
                    f"{self.url} ended its answer with an error: {self._safe(str(piece['error']))}."
                )
            yield piece

    def _counters(self) -> tuple[float, float] | None:
        """Cycles and accepted tokens so far, as vLLM's /metrics counts them; None where there are none."""
        try:
            found = self.client.get(self.url.removesuffix("/v1") + "/metrics", timeout=self.limits.start)
        except httpx.HTTPError:
            return None
        sums = [
            sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", found.text, re.M))) for name in COUNTED
        ]
        return (sums[0], sums[1]) if found.status_code == 200 and COUNTED[0] in found.text else None
