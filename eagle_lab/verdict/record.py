"""A comparison's record: what was asked, what was checked, every pair, and the verdict that they support."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.records import (
    Difference,
    ForkLost,
    InstanceSample,
    Part,
    PartCalls,
    Place,
    Record,
    Sample,
    Side,
)
from eagle_lab.verdict.settings import ComparisonSettings
from eagle_lab.verdict.stats import Verdict


class Draws(Part):
    """Tokens that an engine drew by numbers of its own, held against the target's distribution: how many, and the p of
    their probability integral transforms being uniform (Kolmogorov and Smirnov)."""

    tokens: int
    p_value: float

    @property
    def fit(self) -> bool:
        """Whether they fit; by chance they don't in one run of 10,000."""
        return self.p_value >= 1e-4


class Correctness(Part):
    """What was checked before anything was timed: both mask builders on so many random trees, and on one prompt both
    arms' tokens against plain decoding's (None: identical). unchecked: arms of another target than the pair's, or of
    another dtype by numbers of their own, which have nothing to be held against; draws: of arms that sample by numbers of
    their own, whose texts say nothing."""

    random_trees: int
    prompt: str
    tokens: int
    baseline: Difference | None
    candidate: Difference | None
    unchecked: tuple[Side, ...] = ()
    draws: dict[Side, Draws] = {}


class ArmTold(Part):
    """One arm. keys: what it was told, by the keys of `engines.arm`; engine, version and facts: what it said of itself."""

    keys: dict[str, str | int | float | bool]
    engine: str
    version: str
    facts: dict[str, str | int | float | bool | None] = {}


class Resumed(Part):
    """The run was resumed after so many samples (pairs of decodes, or instances), with the code at `commit` (`dirty`: with changes)."""

    event: Literal["resumed"] = "resumed"
    samples: int
    commit: str | None
    dirty: bool | None


class ForkDied(Part):
    """A process ended early; its finished pairs are kept. last_words: the last line that it wrote to its log."""

    event: Literal["fork died"] = "fork died"
    fork: int
    exit_code: int
    last_words: str


class EngineStopped(Part):
    """A worker or server failed in a fork; its finished pairs are kept. said: why."""

    event: Literal["engine failed"] = "engine failed"
    fork: int
    said: str


class TreeTried(Part):
    """One tree, and the seconds that a token took with it; None: nothing came after the first cycle."""

    total_tokens: int
    top_k: int
    depth: int
    seconds_a_token: float | None


class TreeChosen(Part):
    """An arm left its tree open, and the fastest was taken. prompts: what was decoded for it, by id."""

    event: Literal["tree chosen"] = "tree chosen"
    arm: Side
    prompts: list[str]
    tried: list[TreeTried]

    @property
    def chosen(self) -> TreeTried:
        """The tree with the least time a token."""
        return min(self.tried, key=lambda tree: tree.seconds_a_token or math.inf)


Event = Annotated[Resumed | ForkDied | ForkLost | EngineStopped | TreeChosen, Field(discriminator="event")]


class Forecast(Part):
    """What the run should be able to tell, said before it.

    count: iterations that it will take, and seconds_each of them, by one decode of each arm; half_width: of the interval,
    on the log scale, by the noise that the simulation assumes (None: too few for one, or whole decodes).
    """

    count: int
    seconds_each: float
    half_width: float | None


class ComparisonRecord(Record):
    """instances: what pairs of cycles were taken; samples: pairs of whole decodes, which are all there is for arms that
    can't be stopped inside one, and a check beside instances; stopped_early: the number of iterations at which a declared
    look ended the run; finished and verdict: None while it goes on; arms: baseline and candidate (empty in old
    records); by_blocks: each fork had all of one arm's decodes, then the other's, as two don't fit into memory; places:
    where each fork of a cluster ran, while `environment` is where the run was begun."""

    schema_name: Literal["eagle_lab.comparison.v2"] = Field("eagle_lab.comparison.v2", alias="schema")
    settings: ComparisonSettings
    correctness: Correctness
    arms: list[ArmTold] = []
    by_blocks: bool = False
    instances: list[InstanceSample] = []
    samples: list[Sample] = []
    parts: list[PartCalls] = []
    events: list[Event] = []
    places: list[Place] = []
    forecast: Forecast | None = None
    stopped_early: int | None = None
    finished: datetime | None = None
    verdict: Verdict | None = None

    @property
    def hardware(self) -> str:
        """What it was measured on, by `machine_key`; on a cluster all that its forks ran on."""
        found = {machine_key(place.environment) for place in self.places}
        return " and ".join(sorted(found or {machine_key(self.environment)}))

    @property
    def iterations(self) -> list[InstanceSample] | list[Sample]:
        """The comparison's own samples, of what its settings say is paired; no control's."""
        if self.settings.pairs_of == "cycles":
            return self.instances
        return [s for s in self.samples if not s.control]
