"""Arms in processes of their own: this code in another revision or folder, a fork of the official code, a command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from make import GOLDEN, worktrees

import eagle_lab
from eagle_lab import ROOT
from eagle_lab.decode.generate import decode, decode_plain
from eagle_lab.engines import worker
from eagle_lab.engines.arm import parse
from eagle_lab.engines.here import base_arm
from eagle_lab.engines.opened import command_of, environment, opened, tell
from eagle_lab.engines.place import place
from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.engines.revision import code_of
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.pair import load
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.compare import compare

PROMPT = Prompt("golden", "own", "", (1, 124, 306, 281, 69, 192, 471, 312))
TOKENS = 12


def arm_of(pair, text):
    return parse(text, base_arm(pair))


def test_this_code_in_a_process_of_its_own_decodes_the_same(tiny_pair):
    arm = arm_of(tiny_pair, f"doubling,total_tokens=15,depth=4,python={sys.executable}")
    with opened(tiny_pair, arm, 64) as other:
        found = other.decode(PROMPT, TOKENS, None, True)
    here = decode(tiny_pair, PROMPT.ids, arm.decoding(TOKENS))
    assert list(found.tokens) == here.tokens
    assert list(found.cycles) == [len(cycle.committed) for cycle in here.cycles]
    assert 0 < found.first_token_seconds < found.seconds
    assert other.engine == "eagle_lab" and other.facts["dtype"] == "float32"


def test_another_dtype_is_plain_decoding_in_that_dtype_and_has_its_first_token_s_time(tiny_pair):
    arm = arm_of(tiny_pair, f"plain,dtype=bfloat16,python={sys.executable}")
    with opened(tiny_pair, arm, 64) as other:
        found = other.decode(PROMPT, TOKENS, None, True)
    half = load(tiny_pair.target_name, tiny_pair.draft_name, device="cpu", dtype="bfloat16", verbose=False)
    assert list(found.tokens) == decode_plain(half, PROMPT.ids, arm.decoding(TOKENS)).tokens
    assert other.facts["dtype"] == "bfloat16"
    assert found.counts is None and found.first_token_seconds < found.seconds


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this checkout has no git history")
def test_a_worker_loads_the_quantization_that_it_is_told_or_says_that_its_code_has_none(
    tiny_pair, monkeypatch
):
    asked = tell(tiny_pair, arm_of(tiny_pair, "plain,quantization=fp8"), 64)
    assert asked["quantization"] == "fp8"
    given = {}

    def load(*args, quantization="", **more):
        given["quantization"] = quantization
        return tiny_pair

    monkeypatch.setattr(eagle_lab, "load", load)
    worker.eagle_lab(asked)[1](asked)
    assert given == {"quantization": "fp8"}
    worker.eagle_lab(asked)[1](asked | {"quantization": ""})
    assert given == {"quantization": ""}
    monkeypatch.setattr(eagle_lab, "load", lambda *_, verbose: tiny_pair)
    with pytest.raises(worker.Refused, match="its code has no quantization, and the arm names fp8"):
        worker.eagle_lab(asked)[1](asked)


def test_a_revision_is_decoded_by_its_own_code_and_its_worktree_goes(tiny_pair):
    before = worktrees()
    with opened(tiny_pair, arm_of(tiny_pair, "rebuild,total_tokens=15,depth=4,code=HEAD"), 64) as other:
        assert len(worktrees()) == len(before) + 1
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # as tests/engines/test_place.py has it
        found = other.decode(PROMPT, TOKENS, None, True)
        assert len(other.facts["commit"]) == 40 and not other.facts["dirty"]
    assert worktrees() == before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert list(found.tokens) == decode(tiny_pair, PROMPT.ids, parse("rebuild").decoding(TOKENS)).tokens


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this checkout has no git history")
def test_changes_that_a_worktree_lacks_are_told(monkeypatch, tmp_path):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr("eagle_lab.engines.revision.ROOT", tmp_path)
    with place() as home:
        clean = code_of("HEAD", home)
        assert not clean.left_out and clean.folder == home / "code"
    (tmp_path / "beside.py").write_text("x = 1")
    with place() as home:  # no part of the code that an arm runs
        assert not code_of("HEAD", home).left_out and not code_of(str(tmp_path), home).dirty
    mine = tmp_path / "eagle_lab" / "mine.py"
    mine.parent.mkdir()
    mine.write_text("x = 1")
    with place() as home:
        dirty = code_of("HEAD", home)
        assert dirty.left_out and not (dirty.folder / "eagle_lab" / "mine.py").exists()
    assert mine.exists()  # nothing was stashed
    folder = code_of(str(tmp_path), home)
    assert folder.dirty and folder.folder == tmp_path.resolve()
    with pytest.raises(RuntimeError), place() as home:
        code_of("HEAD", home)
        raise RuntimeError("in the middle of it")
    assert len(worktrees(tmp_path)) == 1


def test_a_folder_without_this_code_is_refused_and_not_decoded_by_this_checkout(tiny_pair, tmp_path):
    with (
        pytest.raises(EngineFailed, match="where no eagle_lab/ lies"),
        opened(tiny_pair, arm_of(tiny_pair, f"rebuild,code={tmp_path}"), 64),
    ):
        pass


def test_a_folder_is_decoded_by_its_own_code(tiny_pair, tmp_path):
    shutil.copytree(ROOT / "eagle_lab", tmp_path / "eagle_lab", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "eagle_lab" / "decode" / "generate.py"
    file.write_text(file.read_text() + "\n\nraise RuntimeError('this is the copy')\n")
    with (
        pytest.raises(EngineFailed, match="this is the copy"),
        opened(tiny_pair, arm_of(tiny_pair, f"rebuild,code={tmp_path}"), 64),
    ):
        pass


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this checkout has no git history")
def test_a_folder_inside_a_checkout_has_no_commit_of_its_own(tmp_path):
    assert code_of(str(ROOT), tmp_path).commit
    assert code_of(str(ROOT / "data"), tmp_path).commit is None


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("engine=vllm,plain,python=nowhere/python", "'nowhere/python', which is no program here"),
        ("code=no-such-thing", "neither a folder nor a revision"),
        ("quantization=fp8", "quantization=fp8 needs a CUDA GPU, but the device is cpu"),
        ("quantization=int3", "quantization 'int3' is unknown"),
        ("quantization=fp8,tensor_parallel_size=2", "for a target on one GPU, and tensor_parallel_size is 2"),
    ],
)
def test_where_an_arm_runs_is_looked_at_before_anything_starts(
    tiny_pair, tmp_path, monkeypatch, candidate, message
):
    monkeypatch.setattr("eagle_lab.measure.outside.opened", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(ValueError, match=message):
        compare(
            tiny_pair, baseline=f"plain,python={sys.executable}", candidate=candidate, prompts=[[1, 2, 3]], iterations=1,
            results_dir=tmp_path,
        )  # fmt: skip


def test_what_an_arm_s_process_inherits(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    cpu = torch.device("cpu")
    assert environment(parse("code=x"), cpu, "/code")["PYTHONPATH"] == f"/code{os.pathsep}/mine"
    assert "PYTHONPATH" not in environment(parse("engine=vllm,plain,python=x"), cpu)
    assert environment(parse("command=x"), cpu)["PYTHONPATH"] == "/mine"
    assert command_of(parse('command="a b \\"c d\\""')) == ["a", "b", "c d"]


@pytest.mark.parametrize("text", ["engine=vllm,plain,python=x", "engine=official,code=x"])
@pytest.mark.parametrize(
    ("device", "here", "seen"),
    [
        ("cuda:1", None, "1"),
        ("cuda:0", None, "0"),
        ("cuda:1", "", "1"),
        ("cuda:1", "5,3", "3"),
        ("cuda:0", "GPU-8a1f, GPU-77c0", "GPU-8a1f"),
        ("cuda:1", "GPU-8a1f, GPU-77c0", "GPU-77c0"),
        ("cpu", "5,3", "5,3"),
        ("cpu", None, None),
    ],
)
def test_an_engine_of_another_project_sees_the_pair_s_gpu_alone(monkeypatch, text, device, here, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if here is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", here)
    assert environment(parse(text), torch.device(device)).get("CUDA_VISIBLE_DEVICES") == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == here  # this process's own stays


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("python=x", "cuda:1"),
        ("tensor_parallel_size=2", "cuda"),
        ("command=x", "cuda:1"),
        ("engine=vllm,plain,python=x", "cuda"),
        ("engine=official,code=x", "cuda"),
    ],
)
def test_own_code_is_told_the_gpu_s_number_and_others_the_first_that_they_see(
    tiny_pair, monkeypatch, text, device
):
    """Own code and commands see all GPUs that this process does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    pair = replace(tiny_pair, device=torch.device("cuda:1"))
    arm = arm_of(pair, text)
    assert tell(pair, arm, 64)["device"] == device
    if arm.tensor_parallel_size > 1:  # transformers would split over the GPUs that it sees
        assert environment(arm, torch.device("cpu"))["CUDA_VISIBLE_DEVICES"] == ""
    alone = arm.engine in ("vllm", "official")
    assert environment(arm, pair.device)["CUDA_VISIBLE_DEVICES"] == ("3" if alone else "5,3")


STAND_IN = """
    import torch
    from transformers import AutoModelForCausalLM

    class Tokenizer:
        eos_token_id = None

    class EaModel:
        def __init__(self, base_model, **told):
            self.base_model, self.told, self.tokenizer = base_model, told, Tokenizer()

        @classmethod
        def from_pretrained(cls, base_model_path, ea_model_path, total_token, depth, top_k, torch_dtype, device_map):
            assert (total_token, depth, top_k) == (16, 4, 10), (total_token, depth, top_k)
            print("a library prints")
            return cls(AutoModelForCausalLM.from_pretrained(base_model_path, dtype=torch_dtype))

        def eval(self):
            return self

        @torch.no_grad()
        def naive_generate(self, input_ids, temperature, top_p, top_k, max_new_tokens, max_length, step=1):
            while True:
                for _ in range(step):
                    last = self.base_model(input_ids).logits[:, -1:].argmax(-1)
                    input_ids = torch.cat((input_ids, last), 1)
                yield input_ids

        def ea_generate(self, *args, **named):
            return self.naive_generate(*args, **named, step=STEP)
"""


@pytest.fixture
def fork(tmp_path):
    """A folder with the names and calls of the official code, whose cycles commit so many tokens."""

    def made(step):
        folder = tmp_path / f"EAGLE-{step}"
        (folder / "eagle" / "model").mkdir(parents=True)
        for package in (folder / "eagle", folder / "eagle" / "model"):
            (package / "__init__.py").touch()
        text = textwrap.dedent(STAND_IN).replace("STEP", str(step))
        (folder / "eagle" / "model" / "ea_model.py").write_text(text)
        return folder

    return made


def test_two_folders_of_a_fork(tiny_pair, fork):
    arm = arm_of(tiny_pair, f"engine=official,code={fork(2)},total_tokens=15,depth=4")
    other = parse(f"code={fork(3)}", arm)
    plain = decode_plain(tiny_pair, PROMPT.ids, parse("plain").decoding(TOKENS)).tokens
    for one, committed in ((arm, [2] * 6), (other, [3] * 4)):
        with opened(tiny_pair, one, 64) as official:
            found = official.decode(PROMPT, TOKENS, 0, True)
        assert list(found.tokens) == plain and list(found.cycles) == committed
    with opened(tiny_pair, replace(arm, plain=True), 64) as official:
        found = official.decode(PROMPT, TOKENS, 0, True)
    assert list(found.tokens) == plain and found.cycles is None


@pytest.mark.parametrize(
    ("dialect", "parts"), [("specforge", "fc_norm, norm_output"), ("speculators", "the speculators dialect")]
)
def test_a_head_that_the_official_code_would_misread_is_refused(tiny_pair, fork, tmp_path, dialect, parts):
    config = replace(tiny_pair.head.config, fc_norm=True, norm_output=True)
    save_draft(
        DraftHead(config, tiny_pair.head.embedding), tmp_path / "head", dialect, target=GOLDEN / "target"
    )
    arm = arm_of(
        tiny_pair, f"engine=official,code={fork(2)},draft={tmp_path / 'head'},total_tokens=15,depth=4"
    )
    with pytest.raises(ValueError, match=f"knows nothing of {parts}"), opened(tiny_pair, arm, 64):
        pass
    with opened(tiny_pair, replace(arm, plain=True), 64) as official:
        assert official.decode(PROMPT, TOKENS, 0, True).cycles is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"engine=official,code={GOLDEN}", "has no folder eagle/model, so it is no checkout of SafeAILab/EAGLE"),
        (f"engine=vllm,plain,python={sys.executable}", "there is no vllm in .*name the environment that has it as python="),
        (f"dtype=float7,python={sys.executable}", "can't load: ValueError: dtype"),
    ],
)  # fmt: skip
def test_an_engine_that_is_not_there_is_said_before_anything_is_timed(tiny_pair, text, message):
    with pytest.raises(EngineFailed, match=message), opened(tiny_pair, arm_of(tiny_pair, text), 64):
        pass


def test_a_version_that_nobody_tried(tiny_pair, tmp_path):
    (tmp_path / "vllm-0.8.5.dist-info").mkdir()
    (tmp_path / "vllm-0.8.5.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.8.5\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with (
        pytest.raises(EngineFailed, match="vllm 0.8.5 is older than 0.26, the oldest that was tried"),
        opened(tiny_pair, arm_of(tiny_pair, f"engine=vllm,plain,python={python}"), 64),
    ):
        pass


def test_a_command_of_thirty_lines(tiny_pair, tmp_path):
    lines = (ROOT / "docs" / "arms.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(lines.splitlines()) <= 30
    (tmp_path / "my_worker.py").write_text(lines)
    arm = arm_of(tiny_pair, f'command="{sys.executable} {tmp_path}/my_worker.py"')
    with opened(tiny_pair, arm, 64) as other:
        found = other.decode(PROMPT, TOKENS, None, True)
    assert list(found.tokens) == decode_plain(tiny_pair, PROMPT.ids, parse("plain").decoding(TOKENS)).tokens
