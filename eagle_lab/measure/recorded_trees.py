"""Real draft trees: recorded while decoding, kept in a few hundred kilobytes, read back for microbenchmarks.

Random trees have other depths and shapes than those that a head grows, so the sweep replays these. A tree is stored as
the selection gave it: the kept candidates' indices, and the candidate index of each frontier slot, from which every
candidate's parent follows. All sizes are selected from the same expansions, at the positions that greedy decoding with
a small tree visits: the tree that is drawn at a position does not depend on how decoding came there.
Run again: `python -m eagle_lab record trees` (about 3 minutes on two cores).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eagle_lab import ROOT
from eagle_lab.decode.expand import expand, joined
from eagle_lab.decode.forward import asked
from eagle_lab.decode.generate import check_shape, draw_uniforms
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.session import session
from eagle_lab.decode.strategy import parse
from eagle_lab.decode.tree import TreeShape, pool_size, select_nodes
from eagle_lab.measure.records import now
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import prepare
from eagle_lab.runtime.clock import no_span

DEFAULT = ROOT / "data" / "trees" / "draft-smollm2-135m.npz"
# total_tokens by the expansion that has room for them: top_k 10 and depth 7 record only 710 candidates
EXPANSIONS = {(10, 7): (15, 31, 63, 127, 255, 511), (16, 8): (1023,)}
SIZES = tuple(size for sizes in EXPANSIONS.values() for size in sizes)
MOST = 96  # trees of a size


class Trees(NamedTuple):
    """T recorded trees of one size: parents int64 [T, n]; top_k and depth of the expansion that they come from."""

    parents: Tensor
    top_k: int
    depth: int


@torch.inference_mode()
def record(
    pair: Pair,
    prompts: str | Sequence[Any] = "heldout",
    path: str | Path = DEFAULT,
    cycles: int = 3,
    expansions: dict[tuple[int, int], tuple[int, ...]] = EXPANSIONS,
) -> Path:
    """Decode `cycles` cycles of each prompt greedily and store the trees of every size that are drawn on the way.

    Raises ValueError for a shape that the head's vocabulary or an expansion's pool has no room for, before decoding.
    """
    shapes = {key: TreeShape(*key, max(sizes)) for key, sizes in expansions.items()}
    for wide in shapes.values():
        check_shape(pair, wide)
    plan, sampling = parse("rebuild"), Sampling()
    first = next(iter(expansions))
    step = TreeShape(*first, min(expansions[first]))
    found: dict[str, list[Tensor]] = {}
    used: list[str] = []
    for prompt in prepare(pair.tokenizer, prompts):
        if len(used) * cycles >= MOST:
            break
        ids = torch.tensor([list(prompt.ids)], device=pair.device)
        room = cycles * step.width + max(shape.top_k * shape.depth for shape in shapes.values()) + step.reach
        slots = ids.shape[1] + room
        uniforms = draw_uniforms(pair, slots + 1, sampling, None)
        with session(pair, plan, step, sampling, 1, slots, ids.shape[1]) as ready:
            ready.prefill(0, ids, uniforms)
            for _ in range(cycles):
                for key, sizes in expansions.items():
                    with asked(pair, plan):
                        grown = expand(pair, ready.state, shapes[key], plan.attention, no_span)
                    _, scores, parents = joined(grown)
                    name = f"{key[0]}x{key[1]}"
                    found.setdefault(f"frontier_{name}", []).append(parents[0, key[0] :: key[0]].cpu())
                    for size in sizes:
                        kept = select_nodes(scores, parents, size)[0]
                        found.setdefault(f"kept_{name}_{size}", []).append(kept[0].cpu())
                out: Any = ready.step()
                ready.state.visible_length += int(out.report[0, 0])
        used.append(prompt.id)
    about = {
        "target": pair.target_name, "draft": Path(str(pair.draft_name)).name, "prompts": used, "cycles": cycles,
        "created": now().isoformat(),
    }  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        name: torch.stack(rows).numpy().astype(np.uint16) for name, rows in found.items()
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


def read(total_tokens: int, path: str | Path = DEFAULT) -> Trees:
    """The recorded trees of one size; ValueError names the sizes there are, or what is missing."""
    try:
        file = np.load(path)
    except FileNotFoundError:
        raise ValueError(
            f"{Path(path).name} is not there; record it with `python -m eagle_lab record trees`."
        ) from None
    with file:
        sizes = {int(name.rpartition("_")[2]): name for name in file.files if name.startswith("kept_")}
        if total_tokens not in sizes:
            have = ", ".join(map(str, sorted(sizes)))
            raise ValueError(f"there are no recorded trees of {total_tokens} tokens; recorded are {have}.")
        shape = sizes[total_tokens].split("_")[1]
        top_k, depth = map(int, shape.split("x"))
        kept = torch.from_numpy(file[sizes[total_tokens]].astype(np.int64))
        frontier = torch.from_numpy(file[f"frontier_{shape}"].astype(np.int64))
    # the parents [T, pool] of all candidates: the root's children, then those of each frontier slot
    above = torch.cat(
        (frontier.new_full((len(frontier), top_k), -1), frontier.repeat_interleave(top_k, 1)), 1
    )
    assert above.shape[1] == pool_size(top_k, depth)
    parent = above.gather(1, kept)
    node = torch.searchsorted(kept, parent.clamp(min=0)) + 1
    return Trees(torch.where(parent < 0, 0, node), top_k, depth)
