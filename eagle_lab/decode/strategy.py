"""`Strategy`: one named choice for each part of the decode that can be done in more than one way.

`parse` reads one from text, `unavailable` says why a choice cannot run on a device, and `check` refuses a strategy
that cannot: nothing is ever replaced by something that can.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass

import torch

from eagle_lab.decode import attention, masks
from eagle_lab.decode.attention import ATTENTIONS, PARTED
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.tree import Count, TreeShape
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime import products
from eagle_lab.runtime.checks import settings
from eagle_lab.runtime.prepare import PIECES, RUNTIMES
from eagle_lab.runtime.products import PRODUCTS

CACHES = ("static", "concat")


def axes() -> dict[str, tuple[str, ...]]:
    """The choices of each axis, by axis name; mask builders may have been added since."""
    return {
        "mask": tuple(MASK_BUILDERS),
        "runtime": RUNTIMES,
        "cache": CACHES,
        "attention": tuple(ATTENTIONS),
        "product": tuple(PRODUCTS),
    }


@dataclass(frozen=True)
class Strategy:
    """A choice on each axis; the defaults are `rebuild`, which everything else is held against."""

    mask: str = "rebuild"
    runtime: str = "eager"
    cache: str = "static"
    attention: str = "sdpa"
    product: str = "library"

    def __str__(self) -> str:
        """The shortest text that parses back: only what differs from the baseline."""
        usual = asdict(Strategy())
        changed = [f"{axis}={name}" for axis, name in asdict(self).items() if name != usual[axis]]
        return ",".join(changed) or "rebuild"


def _unknown(name: str, known: list[str], what: str) -> ValueError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{what} {name!r} is unknown{hint}; known: {', '.join(known)}.")


def parse(text: str | Strategy) -> Strategy:
    """A strategy from text such as "doubling" or "runtime=eager,mask=incremental".

    A bare name is enough where only one axis knows it. ValueError names what is unknown and lists what is known.
    """
    if isinstance(text, Strategy):
        return text
    if not isinstance(text, str):
        raise ValueError(
            f"a strategy is text such as 'rebuild' or 'mask=doubling', not {type(text).__name__}."
        )
    known = axes()
    chosen: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        axis, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            name = axis
            homes = [key for key, names in known.items() if name in names]
            if not homes:
                raise _unknown(name, [n for names in known.values() for n in names], "strategy")
            if len(homes) > 1:
                raise ValueError(
                    f"{name!r} is a choice of {' and '.join(homes)}; write {homes[0]}={name} or {homes[1]}={name}."
                )
            axis = homes[0]
        if axis not in known:
            raise _unknown(axis, list(known), "strategy axis")
        if name not in known[axis]:
            raise _unknown(name, list(known[axis]), f"{axis} strategy")
        if axis in chosen:
            raise ValueError(f"strategy {text!r} names the {axis} twice.")
        chosen[axis] = name
    if not chosen:
        raise ValueError(f"the strategy is empty; known: {', '.join(known['mask'])}.")
    return Strategy(**chosen)


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


def waits_for_host(name: str) -> bool:
    """Whether a mask builder reads values on the host, found by giving it parents that have none.

    A builder that a reader added is tried in the same way; one that says so itself (an attribute `host`, True or
    False) is believed.
    """
    build = MASK_BUILDERS[name]
    told = getattr(build, "host", None)
    if told is not None:
        return bool(told)
    parents = torch.zeros(3, dtype=torch.int64, device="meta")
    try:
        build(parents[None] if getattr(build, "batched", False) else parents)
    except (NotImplementedError, RuntimeError) as error:
        return "copy out of meta" in str(error) or "item()" in str(error)
    return False


def unavailable(axis: str, name: str, device: torch.device | str) -> str | None:
    """Why a choice cannot run on a device, in one sentence without its full stop; None where it can."""
    if axis == "runtime":
        return runtime.unavailable(name, device)
    if axis == "attention":
        return attention.unavailable(name, device)
    if axis == "product":
        return products.unavailable(name, device)
    if axis == "mask" and hasattr(masks, "unavailable"):
        return masks.unavailable(name, device)
    return None


def check(text: str | Strategy, device: torch.device | str, rows: int = 1, tree: bool = True) -> Strategy:
    """The strategy, where each choice can run on the device, and all of them together; else ValueError says why not.

    `tree=False` is plain decoding, which builds no mask and has no head's cache.
    """
    plan = parse(text)
    for axis, name in asdict(plan).items():
        reason = unavailable(axis, name, device) if tree or axis not in ("mask", "cache") else None
        if reason:
            raise ValueError(f"{reason}.")
    if plan.product == "early" and plan.runtime != PIECES:
        raise ValueError(
            f"product=early starts while compiled kernels still run, so it goes with runtime={PIECES} and not with "
            f"runtime={plan.runtime}."
        )
    if plan.product == "early" and plan.attention not in PARTED:
        raise ValueError(
            f"product=early needs layers that are compiled whole, so it goes with attention={' or '.join(PARTED)} and not "
            f"with attention={plan.attention}."
        )
    if not tree:
        return plan
    if plan.cache == "concat" and runtime.fixed(plan.runtime):
        raise ValueError(
            f"cache=concat changes its shapes with every call, so it does not go with runtime={plan.runtime}."
        )
    if plan.cache == "concat" and rows > 1:
        raise ValueError(f"cache=concat holds one prompt, but the batch has {rows}; use cache=static.")
    if runtime.fixed(plan.runtime) and waits_for_host(plan.mask):
        able = [
            name
            for name in MASK_BUILDERS
            if not unavailable("mask", name, device) and not waits_for_host(name)
        ]
        raise ValueError(
            f"mask={plan.mask} loops on the host, so it does not go with runtime={plan.runtime}; "
            f"masks that do here: {', '.join(able)}."
        )
    return plan
