"""The worker protocol and its faults: each is one sentence, with the end of the log, and leaves no process behind."""

from __future__ import annotations

import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import alive
from pydantic import ValidationError

from eagle_lab.engines.protocol import VERSION, Decoded, EngineFailed, Limits, Worker

# the shortest worker: it counts up from the prompt's last id
GOOD = """
import json, os, sys
channel = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
for line in sys.stdin:
    asked = json.loads(line); ask = asked["ask"]
    {before}
    if ask == "end": break
    answer = {{
        "hello": {{"protocol": {version}, "engine": "counter", "version": "1"}},
        "load": {{"facts": {{"layers": 0}}}},
    }}.get(ask) or {{"seconds": 0.5, "first_token_seconds": 0.1, "cycles": [1, 2],
        "tokens": [asked["prompt_ids"][-1] + n for n in range(1, 4)]}}
    {after}
    channel.write(json.dumps(dict(answer, answer=ask)) + "\\n"); channel.flush()
"""
SHORT = Limits(start=20, load=20, first=20, decode=1.5)


@pytest.fixture
def worker(tmp_path):
    """A worker whose loop does something of its own before or after it has its answer."""
    begun = []

    def start(before="pass", after="pass", version=VERSION, limits=SHORT, text=None):
        file = tmp_path / "counter.py"
        file.write_text(text or GOOD.format(before=before, after=after, version=version))
        begun.append(Worker("counter", [sys.executable, "-S", str(file)], limits=limits))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


def ready(one):
    one.hello({})
    one.load({})
    return one


def test_a_worker_answers_and_is_gone(worker):
    one = worker()
    assert one.hello({}).engine == "counter" and one.load({}).facts == {"layers": 0}
    found = one.decode([5, 9], 3, None)
    assert (found.tokens, found.counts, found.length) == ((10, 11, 12), (2, 3), 3)
    one.close()
    assert not alive(one.process.pid)


def test_what_a_worker_prints_is_no_answer(worker):
    one = ready(worker(after="print('loading weights', flush=True)"))
    assert one.decode([1], 3, None).tokens == (2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": "if ask == 'decode': sys.stderr.write('out of memory'); os._exit(3)"}, "with exit code 3.*\n.*\n  out of memory"),
        ({"before": "if ask == 'decode': os.kill(os.getpid(), 9)"}, "ended at 'decode' with signal SIGKILL"),
        ({"before": "if ask == 'decode': channel.write('{\"sec'); channel.flush(); os._exit(0)"}, "ended at 'decode' with exit code 0"),
        ({"before": "if ask == 'decode': import time; time.sleep(60)"}, "did not answer 'decode' within 1.5 s"),
        ({"before": "if ask == 'decode': channel.write('Loading…\\n'); channel.flush()"}, "answered 'decode' with 'Loading…', which"),
        ({"before": "if ask == 'decode': channel.write('[1]\\n'); channel.flush()"}, "which is no JSON object"),
        ({"after": "ask = 'load'"}, "is the answer to something else"),
        ({"after": "answer = {'error': 'the head has other layers.'}"}, "can't decode: the head has other layers"),
        ({"after": "answer['seconds'] = -1"}, "wrong answer to 'decode': seconds is -1; it must be above 0"),
        ({"after": "answer['seconds'] = float('nan')"}, "seconds is nan; it must be a finite number"),
        ({"after": "answer['tokens'] = ['a']"}, "tokens.0 is 'a'; it must be a whole number"),
        ({"after": "answer.pop('seconds', 0)"}, "seconds is missing"),
        ({"after": "answer['tokens'] = [-1]"}, "tokens.0 is -1; it must be at least 0"),
        ({"after": "answer['cycles'] = [2, 0]"}, "cycles.1 is 0; it must be at least 1"),
        ({"after": "answer['committed'] = -3"}, "committed is -3; it must be at least 0"),
        ({"after": "answer['first_token_seconds'] = 9"}, "first_token_seconds are more than seconds"),
        ({"after": "answer['tokens'] = []"}, "tokens are missing"),
        ({"after": "answer['tokens'] = [1] * 9"}, "made 9 tokens where 3 were asked for"),
    ],
)  # fmt: skip
def test_faults_of_a_decode(worker, change, message):
    change = {
        place: text if text.startswith("if ask") else f"if ask == 'decode': {text}"
        for place, text in change.items()
    }
    one = ready(worker(**change))
    with pytest.raises(EngineFailed, match=message):
        one.decode([1], 3, None)
    one.close()
    assert not alive(one.process.pid)


def test_a_worker_that_reads_no_more_and_a_request_longer_than_a_pipe_holds(worker):
    one = ready(
        worker(
            before="if ask == 'load': channel.write('{\"answer\": \"load\"}\\n'); channel.flush(); import time; time.sleep(60)"
        )
    )
    began = time.monotonic()
    with pytest.raises(EngineFailed, match="did not answer 'decode' within 1.5 s"):
        one.decode(list(range(100_000)), 3, None)
    assert time.monotonic() - began < 10
    assert not alive(one.process.pid)


def test_a_worker_that_prints_before_its_channel_is_its_own(worker):
    one = worker(
        text="print('Hello from a library')\n" + GOOD.format(before="pass", after="pass", version=VERSION)
    )
    with pytest.raises(EngineFailed, match="answered 'hello' with 'Hello from a library', which is no JSON"):
        one.hello({})


def test_another_version_of_the_protocol(worker):
    with pytest.raises(EngineFailed, match=f"speaks version 7 of the protocol, this kit {VERSION}"):
        worker(version=7).hello({})


def test_a_worker_that_only_heeds_the_end_of_its_input_ends_by_itself(worker):
    one = ready(worker(before="if ask == 'end': continue"))
    one.close()
    assert one.process.returncode == 0


def test_a_dead_worker_is_told_at_once_however_often_it_is_asked(worker):
    one = ready(worker(before="if ask == 'decode': os._exit(3)", limits=Limits(decode=60)))
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(EngineFailed, match="ended at 'decode' with exit code 3"):
            one.decode([1], 3, None)
    assert time.monotonic() - began < 20


def test_a_program_that_is_not_there():
    with pytest.raises(EngineFailed, match="nobody can't start: /nowhere/python"):
        Worker("nobody", ["/nowhere/python"])


def test_a_hanging_worker_s_children_end_with_it(worker, tmp_path):
    note = tmp_path / "child"
    child = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    one = ready(worker(before=f"if ask == 'decode': {child}"))
    with pytest.raises(EngineFailed, match="did not answer"):
        one.decode([1], 3, None)
    for _ in range(50):
        if not alive(int(note.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(note.read_text()))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(1, 5), max_size=9))
def test_counts_are_the_cycles_or_their_sum(tokens, cycles):
    values = {"seconds": 1.0, "tokens": tokens}
    assert Decoded(**values, cycles=cycles).counts == (len(cycles), sum(cycles))
    assert Decoded(**values, cycle_count=len(cycles), committed=sum(cycles)).counts == (
        len(cycles),
        sum(cycles),
    )
    assert Decoded(**values).counts is None
    assert Decoded.model_validate(
        json.loads(Decoded(**values, cycles=cycles).model_dump_json())
    ).length == len(tokens)


def test_a_decode_has_tokens_or_their_number():
    assert Decoded(seconds=1.0, text="a b", new_tokens=2).length == 2
    with pytest.raises(ValidationError, match="tokens are missing"):
        Decoded(seconds=1.0, text="a b")
