"""Holds a mask builder against the reference, finds the smallest tree it gets wrong, and says what is wrong in words.

All trees of up to five draft nodes are tried first, in order of size, so that a mistake which shows there is shown
on the smallest tree there is; then random ones and those recorded from real decodes, which are shrunk.
"""

from __future__ import annotations

import itertools
import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eagle_lab.decode.masks import MaskBuilder, build_all, own, rebuild
from eagle_lab.models.weights import dtype_name

Parents = tuple[int, ...]
EXHAUSTIVE = 5  # draft nodes up to which every tree is tried: 1 + 2 + 6 + 24 + 120 of them
LARGEST = 63


@dataclass(frozen=True)
class Finding:
    """What a check found. `fault` is the error, None where the builder equals the reference on all `trees`, of which
    `largest` draft nodes was the largest; a failing tree has its parents (of nodes 1…n), the expected mask bool [n + 1,
    n + 1] and, where the builder returned something of that shape, its own."""

    name: str
    fault: str | None
    trees: int
    largest: int
    parents: Parents = ()
    expected: Tensor | None = None
    actual: Tensor | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return self.fault is None


def check(
    build: MaskBuilder,
    recorded: Iterable[Sequence[int]] = (),
    device: torch.device | str = "cpu",
    random_trees: int = 200,
    seed: int = 0,
    name: str | None = None,
    on_tree: Callable[[int], None] | None = None,
) -> Finding:
    """Run a builder on small, random and recorded trees; a mistake of any kind comes back as a `Finding`, not raised.

    Args: build: parents int64 [n] → bool [n + 1, n + 1]; recorded: parents of trees from real decodes; on_tree: told
    before each call how many trees there were, and what it raises ends the check.
    """
    called = name or str(getattr(build, "__name__", "the builder"))
    trees = largest = 0
    for parents in itertools.chain(
        small_trees(EXHAUSTIVE), random_shapes(random_trees, seed), map(tuple, recorded)
    ):
        if on_tree:
            on_tree(trees)
        trees, largest = trees + 1, max(largest, len(parents))
        if fault(build, parents, device) is None:
            continue
        parents = shrink(build, parents, device, on_tree and partial(on_tree, trees))
        told, actual = fault(build, parents, device) or ("fails on this tree, but not every time", None)
        expected = rebuild(torch.tensor(parents))
        words = f"{called!r} {told}"
        if actual is not None or len(parents) > 1:  # what returns nothing at all says no more by its tree
            tree = f"parents {list(parents)}" if len(parents) <= 16 else f"{len(parents)} draft nodes"
            words += f" Smallest failing tree: {tree}."
        return Finding(called, words, trees, largest, parents, expected, actual)
    return Finding(called, None, trees, largest)


def small_trees(most: int) -> Iterator[Parents]:
    """Every tree of 1 to `most` draft nodes, small ones first: node i + 1 hangs on any of the nodes 0…i."""
    for nodes in range(1, most + 1):
        yield from itertools.product(*(range(i + 1) for i in range(nodes)))


def random_shapes(count: int, seed: int) -> Iterator[Parents]:
    """`count` trees of up to 63 draft nodes: a chain, a star, then random ones from bushy to deep."""
    if count:
        yield tuple(range(LARGEST))
        yield (0,) * LARGEST
    generator = torch.Generator().manual_seed(seed)
    for number in range(2, count):
        nodes = int(torch.randint(1, LARGEST + 1, (1,), generator=generator))
        # the square root of a uniform number prefers late parents, which makes deep trees; its square bushy ones
        draw = torch.rand(nodes, generator=generator) ** (0.5, 1.0, 2.0)[number % 3]
        yield tuple((draw * torch.arange(1, nodes + 1)).long().tolist())


def shrink(
    build: MaskBuilder, parents: Parents, device: torch.device | str, before: Callable[[], None] | None = None
) -> Parents:
    """The smallest tree that still fails and is reached by taking out one node after another; `before` each call."""
    smaller = True
    while smaller and len(parents) > 1:
        smaller = False
        for node in range(len(parents), 0, -1):
            if before:
                before()
            less = without(parents, node)
            if fault(build, less, device) is not None:
                parents, smaller = less, True
                break
    return parents


def without(parents: Parents, node: int) -> Parents:
    """The tree without a node (1…n); its children hang on its parent."""
    lifted = parents[node - 1]
    links = (lifted if parent == node else parent for i, parent in enumerate(parents, 1) if i != node)
    return tuple(parent - (parent > node) for parent in links)


def fault(
    build: MaskBuilder, parents: Parents, device: torch.device | str
) -> tuple[str, Tensor | None] | None:
    """What is wrong with a builder's answer on one tree, as "returned …", and the mask if it has the right shape.

    The mask is bool [n + 1, n + 1]. None where nothing is wrong.
    """
    given = torch.tensor(parents, device=device)
    kept, nodes = given.clone(), len(parents) + 1
    try:
        # a batched builder takes [B, n]
        mask = build_all(build, given[None])[0] if getattr(build, "batched", False) else build(given)
    except Exception as error:  # whatever the reader's function raises is the finding
        return explain(build, error), None
    if mask is None:
        return "returned None: is there a `return` at its end?", None
    if not isinstance(mask, Tensor):
        return f"returned a {type(mask).__name__}; it must return a torch.Tensor.", None
    if mask.layout is not torch.strided:
        return f"returned a {dtype_name(mask.layout)} tensor; it must be a dense one (`.to_dense()`).", None
    if tuple(mask.shape) != (nodes, nodes):
        shape = "×".join(map(str, mask.shape)) or "a single number"
        said = f"returned shape {shape}; a tree of {nodes} nodes needs {nodes}×{nodes}"
        return f"{said} (the root is row and column 0, node i + 1 has parents[i]).", None
    if mask.dtype != torch.bool:
        said = f"returned dtype {dtype_name(mask.dtype)}; it must be bool"
        cast = mask.bool().cpu() if mask.device.type != "meta" else None
        return f"{said} (`.bool()`, or dtype=torch.bool where it is made).", cast
    if mask.device != given.device:
        said = f"returned a mask on {mask.device}, but the tree is on {given.device}"
        return f"{said}; make it with device=parents.device.", None
    if not torch.equal(given, kept):
        return "changed `parents` in place; the decode still needs them, so work on parents.clone().", None
    expected = rebuild(kept.cpu())
    actual = mask.cpu()
    return None if torch.equal(actual, expected) else (_difference(actual, expected), actual)


def _difference(actual: Tensor, expected: Tensor) -> str:
    row, column = (int(x) for x in (actual != expected).nonzero()[0])
    count = int((actual != expected).sum())
    if expected[row, column]:
        why = "itself" if row == column else "the root" if column == 0 else "an ancestor"
        told = f"hides node {column} from node {row}, though it is {why}"
    else:
        told = f"lets node {row} attend to node {column}, which is no ancestor of it"
    return f"{told} ({count} of {actual.numel()} entries are wrong)."


def explain(build: MaskBuilder, error: BaseException) -> str:
    """An exception out of a reader's function in one sentence, with its own line and without our frames."""
    code = getattr(build, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    frames = frames if own(build) else []
    where = ""
    if frames:
        line = (frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0)).strip()
        where = f" in line {frames[-1].lineno} of its cell or file{f', `{line}`' if line else ''}"
    said = str(error).strip().splitlines()
    return f"raised {type(error).__name__}{where}: {said[0] if said else 'without a message'}."


def told(build: MaskBuilder, error: BaseException, name: str) -> str:
    """Any error of a decode in one sentence: the reader's own line where the error comes out of their builder."""
    if own(build) and " in line " in (words := explain(build, error)):
        return f"{name!r} {words}"
    kind = type(error).__name__
    said = str(error).strip() or kind
    return said if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{kind}: {said}"
