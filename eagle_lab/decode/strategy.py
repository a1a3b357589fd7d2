"""`Strategy`: one named choice for each part of the decode that can be done in more than one way.

`AXES` is the one table of the choices and of what each needs. `parse` reads a strategy from text, `unavailable` says why a
choice cannot run on a device, and `check` refuses a strategy that cannot: nothing is ever replaced by something that can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from eagle_lab.decode.attention import SPLIT
from eagle_lab.decode.masks import MASK_BUILDERS, NEEDS, MaskBuilder
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.tree import Count, TreeShape
from eagle_lab.runtime import needs
from eagle_lab.runtime.checks import nearest, settings
from eagle_lab.runtime.kernels.float8 import CAPABILITY
from eagle_lab.runtime.needs import Needs
from eagle_lab.runtime.prepare import REGIONAL, RUNTIMES, fixed


@dataclass(frozen=True)
class Choice:
    """One choice of an axis.

    needs: of the machine; goes_with: the choices of another axis that it goes with, all where an axis isn't named; because:
    the reason, a clause that follows the name; rows: the most prompts of a batch, None for any number.
    """

    needs: Needs = Needs()
    goes_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    because: str = ""
    rows: int | None = None


class _Masks(Mapping[str, Choice]):
    """The mask builders as choices; `mask_builder` may have added some since."""

    def __contains__(self, name: object) -> bool:
        return name in MASK_BUILDERS

    def __getitem__(self, name: str) -> Choice:
        if not waits_for_host(name):
            return Choice(NEEDS.get(name, Needs()))
        free = tuple(runtime for runtime in RUNTIMES if not fixed(runtime))
        return Choice(NEEDS.get(name, Needs()), {"runtime": free}, "loops on the host")

    def __iter__(self) -> Iterator[str]:
        return iter(MASK_BUILDERS)

    def __len__(self) -> int:
        return len(MASK_BUILDERS)


AXES: dict[str, Mapping[str, Choice]] = {
    "mask": _Masks(),
    "runtime": {
        "eager": Choice(),
        "compile": Choice(Needs(compiler=True)),
        "cuda_graph": Choice(Needs(device="cuda")),
        REGIONAL: Choice(Needs(device="cuda")),
    },
    "cache": {
        "static": Choice(),
        "concat": Choice(
            goes_with={"runtime": ("eager",)}, because="changes its shapes with every call", rows=1
        ),
    },
    "attention": {
        "sdpa": Choice(),
        "eager": Choice(),
        "tree": Choice(),
        "tree_fused": Choice(Needs(device="cuda", package="triton")),
    },
    "product": {
        "library": Choice(),
        "early": Choice(
            Needs(device="cuda", package="triton", early_launch=True),
            {"runtime": (REGIONAL,), "attention": SPLIT},
            "starts while compiled kernels still run, in layers that are compiled whole",
        ),
        "transposed": Choice(Needs(device="cpu")),
    },
    "head": {
        "full": Choice(),
        "fp8": Choice(Needs(capability=CAPABILITY)),
    },
}


DRAFT_AXES = ("mask", "cache", "head")  # the axes that plain decoding has not


@dataclass(frozen=True)
class Strategy:
    """A choice on each axis; the defaults are `rebuild`, which everything else is held against."""

    mask: str = "rebuild"
    runtime: str = "eager"
    cache: str = "static"
    attention: str = "sdpa"
    product: str = "library"
    head: str = "full"

    def __str__(self) -> str:
        """The shortest text that parses back: only what differs from the baseline."""
        usual = asdict(Strategy())
        changed = [f"{axis}={name}" for axis, name in asdict(self).items() if name != usual[axis]]
        return ",".join(changed) or "rebuild"


def _unknown(name: str, known: list[str], what: str) -> ValueError:
    table = "\n".join(f"  {axis}: {', '.join(choices)}" for axis, choices in AXES.items())
    return ValueError(
        f"{what} {name!r} is unknown{nearest(name, known) or '.'}\nThe axes and their choices:\n{table}"
    )


def parse(text: str | Strategy) -> Strategy:
    """A strategy from text such as "doubling" or "runtime=eager,mask=incremental".

    A bare name is enough where only one axis knows it. Raises ValueError, which names what is unknown and lists the axes
    with their choices.
    """
    if isinstance(text, Strategy):
        return text
    chosen = choices(text)
    if not chosen:
        raise ValueError(f"the strategy is empty; masks are {', '.join(AXES['mask'])}.")
    return Strategy(**chosen)


def choices(text: str) -> dict[str, str]:
    """The axes that a strategy's text names, with their choices. Raises ValueError as `parse` does."""
    if not isinstance(text, str):
        raise ValueError(
            f"a strategy is text such as 'rebuild' or 'mask=doubling', not {type(text).__name__}."
        )
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, equals, name = (side.strip() for side in part.partition("="))
        if not equals:
            name = axis
            homes = [key for key, choices in AXES.items() if name in choices]
            if not homes:
                raise _unknown(name, [n for choices in AXES.values() for n in choices], "strategy")
            if len(homes) > 1:
                raise ValueError(
                    f"{name!r} is a choice of {' and '.join(homes)}; write {homes[0]}={name} or {homes[1]}={name}."
                )
            axis = homes[0]
        if axis not in AXES:
            raise _unknown(axis, list(AXES), "strategy axis")
        if name not in AXES[axis]:
            raise _unknown(name, list(AXES[axis]), f"{axis} strategy")
        if axis in chosen:
            raise ValueError(f"strategy {text!r} names the {axis} twice.")
        chosen[axis] = name
    return chosen


@settings
class Decoding:
    """Everything that a decode is told besides its prompt: made once from a caller's keywords, and handed on whole.

    `seed` draws the tokens where the temperature isn't 0; None is a new one each time. No field but the seed has a
    default, so that no decode inside the kit can leave out what its caller asked for.
    Raises ValueError, one sentence, for bad values.
    """

    strategy: Strategy
    shape: TreeShape
    sampling: Sampling
    max_new_tokens: Count
    seed: int | None = None

    @classmethod
    def of(
        cls,
        max_new_tokens: int,
        strategy: str | Strategy = "rebuild",
        *,
        top_k: int = 10,
        depth: int = 7,
        total_tokens: int = 63,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k_sampling: int = 0,
        seed: int | None = None,
    ) -> Decoding:
        """From the keywords of `generate`."""
        shape = TreeShape(top_k, depth, total_tokens)
        sampling = Sampling(temperature, top_p, top_k_sampling)
        return cls(parse(strategy), shape, sampling, max_new_tokens, seed)


HOST_READS = frozenset({
    "tolist", "item", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal", "is_nonzero", "__array__",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
})  # fmt: skip


class _Watched(TorchFunctionMode):
    """Notes whether a value, or a shape that depends on values, is asked for on the host."""

    reads = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indexed = args[1] if name in ("__getitem__", "__setitem__") else None
        chosen = indexed if isinstance(indexed, tuple) else (indexed,)
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in chosen)
        self.reads = self.reads or name in HOST_READS or by_mask
        return func(*args, **(kwargs or {}))


def waits_for_host(name: str) -> bool:
    """Whether a mask builder reads values on the host: as its mark `host` says, else found by watching it build a mask.

    A builder that fails on the CPU is not said to wait; its error shows where it is used.
    """
    build: MaskBuilder = MASK_BUILDERS[name]
    marked = getattr(build, "host", None)
    if marked is not None:
        return bool(marked)
    parents = torch.tensor([0, 0, 1])
    with _Watched() as watched:
        try:
            build(parents[None] if getattr(build, "batched", False) else parents)
        except Exception:
            return watched.reads
    return watched.reads


def unavailable(axis: str, name: str, device: torch.device | str) -> str | None:
    """Why a choice cannot run on a device, in one sentence without its full stop; None where it can."""
    return needs.missing(f"{axis}={name}", AXES[axis][name].needs, device)


def check(text: str | Strategy, device: torch.device | str, rows: int = 1, tree: bool = True) -> Strategy:
    """The strategy, where each choice can run on the device, and all of them together.

    `tree=False` is plain decoding, which builds no mask and has no head.
    Raises ValueError, which says why not.
    """
    strategy = parse(text)
    chosen = {a: n for a, n in asdict(strategy).items() if tree or a not in DRAFT_AXES}
    for axis, name in chosen.items():
        if reason := unavailable(axis, name, device):
            raise ValueError(f"{reason}.")
    for axis, name in chosen.items():
        choice = AXES[axis][name]
        for other, known in choice.goes_with.items():
            if getattr(strategy, other) in known:
                continue
            able = [n for n in AXES[axis] if not unavailable(axis, n, device) and _goes(axis, n, strategy)]
            raise ValueError(
                f"{axis}={name} {choice.because}, so it goes with {other}={' or '.join(known)} and not with "
                f"{other}={getattr(strategy, other)}; with that go {axis}={', '.join(able)}."
            )
        if choice.rows is not None and rows > choice.rows:
            raise ValueError(f"{axis}={name} holds one prompt, but the batch has {rows}; use {axis}=static.")
    return strategy


def _goes(axis: str, name: str, strategy: Strategy) -> bool:
    goes_with = AXES[axis][name].goes_with
    return all(getattr(strategy, other) in known for other, known in goes_with.items())
