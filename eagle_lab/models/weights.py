"""Tensor files, read with care: nothing in them is executed, and what is wrong with them is one clear sentence.

A folder holds `model.safetensors`, shards listed by `model.safetensors.index.json`, or a `pytorch_model.bin`
pickle. Pickles are read with `weights_only=True`, which refuses anything but tensors. What can be detected: cut-off
files, damaged headers, damaged pickle archives (their CRC), NaN and infinity, and any damage at all where a
checksum is known: the folder's `SHA256SUMS`, or the name that the hub's cache gives a file. A flipped bit in a
safetensors file without a checksum is one slightly wrong number: the format has no means to show it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SUMS = "SHA256SUMS"
_SAFE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Form = tuple[torch.dtype | None, tuple[int, ...]]  # a tensor's dtype (None: one that torch lacks) and shape


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object.")
    return found


def inside(folder: Path, name: object) -> Path:
    """The path of a file that a checkpoint names; ValueError where it would leave the checkpoint's folder."""
    text = str(name)
    outside = any(path.anchor or ".." in path.parts for path in (PurePosixPath(text), PureWindowsPath(text)))
    if not isinstance(name, str) or not text or outside:
        raise ValueError(f"{folder} names the file {text!r}, which lies outside its folder; it is not read.")
    return folder / text


def shards(index: Path) -> list[Path]:
    """The files that an index lists, each once and each inside the index's folder.

    Raises ValueError for an index without a weight_map, or one that points outside its folder.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map, so its shards are unknown.")
    return list(dict.fromkeys(inside(index.parent, name) for name in listed.values()))


def weight_files(folder: Path) -> list[Path]:
    """The tensor files of a folder, safetensors before pickles; FileNotFoundError where there are none."""
    for whole, index in ((SAFE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            return shards(folder / index)
    raise FileNotFoundError(
        f"{folder} holds none of {SAFE}, {INDEX}, {PICKLE} and {PICKLE_INDEX}, so it has no weights."
    )


def check_sums(files: list[Path]) -> None:
    """Compare files with their checksums, where those are known (see the module's docstring).

    Raises ValueError for a file that differs.
    """
    for path in files:
        wanted, source = None, ""
        sums = path.parent / SUMS
        if sums.exists():
            lines = [line.split(maxsplit=1) for line in sums.read_text(errors="replace").splitlines()]
            # sha256sum marks a file that it read as binary by a star, and may name it by its folder
            listed = {
                line[1].strip().removeprefix("*").removeprefix("./"): line[0]
                for line in lines
                if len(line) == 2
            }
            wanted, source = listed.get(path.name), SUMS
        blob = path.resolve().name
        if wanted is None and path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob):
            wanted, source = blob, "the hub's checksum"
        if wanted and digest(path) != wanted.lower():
            raise ValueError(
                f"{path} is damaged or was exchanged: it does not match {source}; get the file again."
            )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forms(files: list[Path]) -> dict[str, Form]:
    """Dtype and shape of every tensor in the files, without their data where the format allows it.

    Raises ValueError for a tensor that two files hold.
    """
    found: dict[str, Form] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with _open(path) as file:
                here: dict[str, Form] = {}
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    here[name] = (_SAFE_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        else:
            here = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _unpickle(path).items()}
        twice = sorted(found.keys() & here.keys())
        if twice:
            raise ValueError(f"{path} holds {twice[0]} a second time; another shard has it too.")
        found |= here
    return found


def tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files, on the CPU; ValueError where one holds NaN or infinity.

    By name, each [...] and of the dtype that the file gives it.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with _open(path) as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            found |= _unpickle(path)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{files[0].parent} is damaged: tensor {name} holds NaN or infinity.")
    return found


def dtype_name(kind: torch.dtype | torch.layout | None) -> str:
    """A dtype's name as a config and a reader have it: "float16" for torch.float16, "None" for one that torch has not."""
    return str(kind).removeprefix("torch.")


def own_part(tensor: Any) -> Tensor:
    """This process's part [...] of a tensor [...] that several share; the tensor itself where none do."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_finite(model: nn.Module, what: str, dtype: torch.dtype) -> None:
    """ValueError, one sentence, for a model that holds NaN or infinity, as after a cast to float16.

    Source: float16 ends at 65,504; bfloat16 and float32 at 3.4e38.
    """
    # infinity stays, and NaN too, through a sum of the extremes; nothing as large as the weights is made
    extremes = {
        name: torch.stack(torch.aminmax(local)).float().sum()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if (local := own_part(tensor)).numel()
        and local.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    for name, value in extremes.items():  # after all were started: each reading waits for a GPU
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"the {what}'s weight {name} isn't finite in {dtype_name(dtype)}; load with "
                "dtype='bfloat16' or dtype='float32', whose range is larger, or get the file again if it isn't finite there "
                "either."
            )


def reason_of(error: BaseException) -> str:
    """The line of an error's text that says what is wrong, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "GLOBAL" in line), lines[0]).split(". ")[0].rstrip(".")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, though the checkpoint lists it.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is cut off or damaged, or is not a safetensors file: {error}.") from None


def _unpickle(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, though the checkpoint lists it.")
    archive = zipfile.is_zipfile(path)
    try:
        if archive:
            with zipfile.ZipFile(path) as file:
                bad = file.testzip()  # torch itself does not look at the CRCs
            if bad:
                raise ValueError(f"{path} is damaged: the checksum of its part {bad} is wrong.")
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=archive)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and is not loaded: {reason_of(error)}."
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is cut off or damaged, or is not a PyTorch file: {reason_of(error)}."
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and type(v) is Tensor for k, v in loaded.items()
    ):
        raise ValueError(f"{path} does not hold a plain dict of named tensors.")
    return loaded
