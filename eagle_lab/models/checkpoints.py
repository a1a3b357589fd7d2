"""Published draft-head checkpoints, read and written; every tensor is accounted for before any is loaded."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eagle_lab.models import dialects, targets, weights
from eagle_lab.models.draft import DraftConfig, DraftHead
from eagle_lab.models.weights import Form, dtype_name

LAYER = {"official": "midlayer.", "specforge": "midlayer.", "speculators": "layers.0."}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool,)}


def read_draft_json(folder: str | Path) -> dict[str, Any]:
    """The raw config.json of a draft folder."""
    return weights.read_json(Path(folder) / "config.json")


def _canonical(found: dict[str, Any]) -> dict[str, Any]:
    """The same dict under the official dialect's tensor names; both layer names are known in every dialect."""
    renamed = {re.sub(r"^layers\.0\.", "midlayer.", name): value for name, value in found.items()}
    if len(renamed) != len(found):
        raise ValueError("the draft's weights hold the same layer twice, as midlayer and as layers.0.")
    return renamed


def _folder_config(folder: Path, layers: int) -> tuple[DraftConfig, dict[str, Form]]:
    raw = read_draft_json(folder)
    config = dialects.read(raw, layers)
    found = _canonical(weights.forms(weights.weight_files(folder)))
    config = replace(config, own_embeddings="embed_tokens.weight" in found)
    # The implementations of the first two dialects make no biases whatever the config says (only some have one in fc),
    # so there the weights decide; a bias that the config does not allow is still an unexpected tensor.
    if dialects.recognise(raw) != "speculators":
        config = replace(
            config,
            attention_bias=config.attention_bias and "midlayer.self_attn.q_proj.bias" in found,
            mlp_bias=config.mlp_bias and "midlayer.mlp.up_proj.bias" in found,
            fc_bias=config.fc_bias and "fc.bias" in found,
        )
    return config, found


def read_config(folder: str | Path, layers: int) -> DraftConfig:
    """The head's configuration from a folder in any dialect, for a target of `layers` layers; reads no weights."""
    return _folder_config(Path(folder), layers)[0]


def check_forms(folder: Path, config: DraftConfig, found: dict[str, Form], borrow: bool) -> None:
    """Compare the tensors' names, shapes and types with the head's; ValueError names every one that is wrong."""
    with torch.device("meta"):
        wanted = DraftHead(config, None).state_dict()
    missing = set(wanted) - set(found)
    if borrow:
        missing.discard("lm_head.weight")
    if "d2t" in found:
        missing.discard("t2d")  # d2t says the same
    unexpected = set(found) - set(wanted)
    if not config.mapped:
        unexpected -= {"d2t", "t2d"}  # allowed where they map every id to itself; checked with the data
    wrong = []
    for name in sorted(set(wanted) & set(found)):
        dtype, shape = found[name]
        kinds = KINDS.get(name, FLOATS)
        if shape != tuple(wanted[name].shape):
            wrong.append(f"{name} has shape {list(shape)} instead of {list(wanted[name].shape)}")
        elif dtype not in kinds:
            names = " or ".join(dtype_name(kind) for kind in kinds)
            wrong.append(f"{name} is {dtype_name(dtype)} instead of {names}")
    complaints = [
        *([f"missing {', '.join(sorted(missing))}"] if missing else []),
        *([f"unexpected {', '.join(sorted(unexpected))}"] if unexpected else []),
        *wrong,
    ]
    if complaints:
        raise ValueError(f"the draft head in {folder} does not fit its config: {'; '.join(complaints)}.")


def _check_vocabulary(folder: Path, config: DraftConfig, found: dict[str, Tensor]) -> None:
    """Check that d2t and t2d say the same, distinct ids inside the target's vocabulary; t2d is made where it is missing."""
    if not config.mapped:
        for name in ("d2t", "t2d"):
            tensor = found.pop(name, None)
            if tensor is not None and not bool(((tensor == 0) if name == "d2t" else (tensor != 0)).all()):
                raise ValueError(
                    f"the draft head in {folder} has no smaller vocabulary, but its {name} is not the identity."
                )
        return
    found["d2t"] = found["d2t"].to(torch.int64)
    ids = torch.arange(config.draft_vocab_size) + found["d2t"]
    if not bool(((ids >= 0) & (ids < config.vocab_size)).all()):
        raise ValueError(f"the draft head in {folder} is damaged: d2t leads outside the target's vocabulary.")
    seen = torch.zeros(config.vocab_size, dtype=torch.bool)
    seen[ids] = True
    if int(seen.sum()) != config.draft_vocab_size:
        raise ValueError(f"the draft head in {folder} is damaged: d2t leads to the same id twice.")
    if not torch.equal(seen, found.setdefault("t2d", seen)):
        raise ValueError(f"the draft head in {folder} is damaged: d2t and t2d contradict each other.")


def _borrows(config: DraftConfig, found: dict[str, Any], raw: dict[str, Any]) -> bool:
    # with no draft vocabulary, SGLang takes a missing lm_head from the target (or from tied embeddings)
    return "lm_head.weight" not in found and (
        raw.get("draft_vocab_size") is None or bool(raw.get("tie_word_embeddings"))
    )


def check_draft(folder: str | Path, layers: int, hidden_size: int, vocab_size: int) -> DraftConfig:
    """Everything about a draft that can be checked without its data or the target's: → its configuration.

    Args: the target's number of layers, hidden size and vocabulary size. ValueError for the first thing that is wrong.
    """
    folder = Path(folder)
    config, found = _folder_config(folder, layers)
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"the draft head's vocabulary ({config.vocab_size}) is not the target's ({vocab_size})."
        )
    if config.tap_size != hidden_size:
        raise ValueError(
            f"the draft head reads hidden states of size {config.tap_size}, but the target's are of size {hidden_size}."
        )
    if not config.own_embeddings and config.hidden_size != hidden_size:
        raise ValueError(
            f"the draft head (hidden size {config.hidden_size}) has no embeddings of its own, and the target's, of size "
            f"{hidden_size}, do not fit it."
        )
    check_forms(folder, config, found, _borrows(config, found, read_draft_json(folder)))
    return config


def draft_bytes(config: DraftConfig, dtype: torch.dtype) -> int:
    """Bytes of a head's weights in a dtype."""
    with torch.device("meta"):
        head = DraftHead(config, None)
    return sum(p.numel() for p in head.parameters()) * dtype.itemsize


def load_draft(
    folder: str | Path, layers: int, embedding: nn.Module, output: nn.Module | None = None
) -> DraftHead:
    """The head in a folder, in any dialect, on the CPU in the dtype of its file; every tensor accounted for.

    Args: layers, the target's; embedding, its input embeddings; output, its lm_head, for heads that share it.
    """
    folder = Path(folder)
    raw = read_draft_json(folder)
    config, forms = _folder_config(folder, layers)
    borrow = _borrows(config, forms, raw)
    check_forms(folder, config, forms, borrow)
    files = weights.weight_files(folder)
    weights.check_sums(files)
    found = _canonical(weights.tensors(files))
    _check_vocabulary(folder, config, found)
    if borrow:
        found["lm_head.weight"] = _shared_output(folder, config, raw, found, output)
    kinds = {tensor.dtype for tensor in found.values() if tensor.is_floating_point()}
    # one dtype for the module: mixed files are widened, which loses nothing
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    head = DraftHead(config, embedding).to(dtype)
    head.load_state_dict(found, strict=True)
    return head


def _shared_output(
    folder: Path, config: DraftConfig, raw: dict[str, Any], found: dict[str, Tensor], output: nn.Module | None
) -> Tensor:
    tied = bool(raw.get("tie_word_embeddings")) and "embed_tokens.weight" in found
    weight = found["embed_tokens.weight"] if tied else getattr(output, "weight", None)
    shape = (config.draft_vocab_size, config.hidden_size)
    if weight is None or tuple(weight.shape) != shape:
        raise ValueError(
            f"the draft head in {folder} has no lm_head, and the target has none of shape {list(shape)} to lend."
        )
    return weight.detach().cpu().clone()


def save_draft(
    head: DraftHead,
    folder: str | Path,
    dialect: str = "official",
    pickled: bool = False,
    target: str | Path | None = None,
) -> None:
    """Write a head's config.json, weights and SHA256SUMS in a dialect.

    pickled: pytorch_model.bin, the older official form, instead of model.safetensors. target: the hub name or folder of
    the head's target, which the speculators dialect names. That dialect gets the embeddings too: its own library takes
    whatever memory holds where they are missing (speculators 0.9). Warns where vLLM and SGLang read the taps unlike.
    Raises: ValueError where the dialect can't say what the head is, before anything is written.
    """
    state = head.state_dict()
    speculators = dialect == "speculators"
    verifier = _verifier(head.config, target) if speculators and target is not None else None
    if speculators and head.embedding is not None:
        state.setdefault("embed_tokens.weight", head.embedding.weight.to(head.fc.weight.dtype))
    kind = dtype_name(head.fc.weight.dtype)
    raw = dialects.write(head.config, dialect, kind, verifier)
    if speculators and "embed_tokens.weight" not in state:
        raise ValueError(
            "the speculators dialect holds the head's embeddings, and this head has none to write."
        )
    if "eagle_config" in raw:
        warnings.warn(
            f"{folder}: SGLang reads {dialects.TAP_KEY} in eagle_config as layers' outputs, as they are written here; vLLM "
            "reads them as inputs, one layer lower.",
            stacklevel=2,
        )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file stands there, or nobody may write
        raise ValueError(
            f"the head can't be saved in {folder} ({error.strerror}); name another folder."
        ) from None
    found = {
        re.sub(r"^midlayer\.", LAYER[dialect], name): x.detach().cpu().contiguous()
        for name, x in state.items()
    }
    path = folder / (weights.PICKLE if pickled else weights.SAFE)
    for stale in (weights.PICKLE, weights.SAFE, weights.INDEX):
        # an older file of another kind would be read in place of this one
        (folder / stale).unlink(missing_ok=True)
    if pickled:
        torch.save(found, path)
    else:
        save_file(found, path, metadata={"format": "pt"})
    (folder / weights.SUMS).write_text(f"{weights.digest(path)}  {path.name}\n")
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    # safetensors writes files that only their owner can read
    path.chmod((folder / "config.json").stat().st_mode)


def _verifier(config: DraftConfig, target: str | Path) -> dict[str, Any]:
    """What the speculators dialect says of the target; ValueError where the head isn't one for it."""
    whole = targets.read_target_config(targets.find_target(target))
    found = whole.get_text_config(decoder=True)
    for name, mine, theirs in (
        ("layers", config.target_layers, found.num_hidden_layers),
        ("tokens in its vocabulary", config.vocab_size, found.vocab_size),
    ):
        if mine != theirs:
            raise ValueError(
                f"the head was made for a target with {mine} {name}, but {target} has {theirs}; name its own target."
            )
    name = str(Path(target).resolve()) if Path(target).is_dir() else str(target)
    return {"name_or_path": name, "architectures": list(whole.architectures or [])}
