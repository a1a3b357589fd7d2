"""What the controls say: which arms, on which pairs, and what a result of them is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eagle_lab.decode.masks import MASK_BUILDERS, MaskBuilder
from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.tree import TreeShape
from eagle_lab.engines.arm import Arm, parse
from eagle_lab.engines.here import base_arm, check_arm, is_here, pair_of
from eagle_lab.models.pair import Pair, load
from eagle_lab.notebook.controls import SIZES, Controls

SAID = (*SIZES, "prompt", "arm", "more", "device", "baseline", "more_baseline", "iterations", "delta")


@dataclass(frozen=True)
class Of:
    """What a result is of: the arm, or the candidate and the baseline, and their mask builders as they were; the prompt
    is None for a comparison, which has so many prompts of its own and a δ in percent as its rule. said: the controls'
    values."""

    arms: tuple[Arm, ...]
    prompt: str | None
    device: str
    max_new_tokens: int
    builders: tuple[MaskBuilder | None, ...]
    rule: tuple[int, float] | None
    said: Mapping[str, Any] = field(compare=False)


def builder(arm: Arm) -> MaskBuilder | None:
    """The mask builder that an arm has now; None for plain decoding and for one that is gone."""
    return None if arm.plain else MASK_BUILDERS.get(arm.strategy.mask)


def _text(arm: str, more: str) -> str:
    return ",".join(filter(None, (arm, more.strip(" ,"))))


class Said:
    """The controls' values as arms, and the pairs that decode them: one a device, loaded on first use."""

    def __init__(self, pair: Pair, controls: Controls) -> None:
        self.controls = controls
        self.pairs = {str(pair.device): pair}
        self.tokenizer, self.own_head = pair.tokenizer, pair.draft_name

    @property
    def loaded(self) -> bool:
        """Whether there is a pair on the chosen device already."""
        return self.controls.device.value in self.pairs

    @property
    def pair(self) -> Pair:
        """The pair on the chosen device, loaded there on first use; ValueError for one that was put together by hand."""
        device = self.controls.device.value
        first = next(iter(self.pairs.values()))
        if device not in self.pairs:
            if not first.origin:
                raise ValueError(f"this pair was put together by hand, so it can't be loaded on {device}.")
            here = {"device": device, "dtype": None, "device_map": None, "tp_plan": None}
            kept = {name: value for name, value in first.origin.items() if name not in here}
            self.pairs[device] = load(**kept, device=device)
        return self.pairs[device]

    def pair_of(self, arm: Arm) -> Pair:
        """The pair with the arm's own head, loaded on first use. Raises ValueError for an arm of another process."""
        pair = self.pair
        if not is_here(pair, arm):
            raise ValueError(
                "this arm needs a process of its own; the console decodes strategies, trees and heads beside its target. "
                "`python -m eagle_lab compare` takes any arm."
            )
        own = pair_of(pair, arm)
        check_arm(own, arm)
        return own

    def absent_head(self, arm: Arm) -> str | None:
        """The head that decoding the arm here would load first; None where it is there."""
        here = not arm.plain and is_here(self.pair, arm)
        return arm.draft if here and arm.draft not in ("", self.own_head, *self.pair.beside) else None

    def since(self) -> Arm:
        """What both arms inherit: the pair's own head, the tree and the temperature of the controls."""
        c = self.controls
        shape = TreeShape(c.top_k.value, c.depth.value, c.total_tokens.value)
        return base_arm(self.pair, Arm(shape=shape, sampling=Sampling(c.temperature.value)))

    def of(self, compared: bool = False) -> Of:
        """What a run of the controls, or a comparison, would be of. ValueError for an arm that can't be read."""
        c = self.controls
        said, since = {name: getattr(c, name).value for name in SAID}, self.since()
        arms = [parse(_text(said["arm"], said["more"]), since)]
        if compared:
            arms.append(parse(_text(said["baseline"], said["more_baseline"]), since))
        return Of(
            arms=tuple(arms), prompt=None if compared else said["prompt"], device=said["device"],
            max_new_tokens=said["max_new_tokens"], builders=tuple(map(builder, arms)),
            rule=(c.iterations.value, c.delta.value) if compared else None, said=said,
        )  # fmt: skip

    def now(self, compared: bool) -> Of | None:
        """`of`; None where no pair is there yet for the device, or an arm can't be read."""
        try:
            return self.of(compared) if self.loaded else None
        except ValueError:
            return None
