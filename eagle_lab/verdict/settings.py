"""What a comparison was asked to do: checked before any work, and written down so that it can be done again."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from eagle_lab.measure.records import PairsOf, Part
from eagle_lab.runtime.checks import sentence
from eagle_lab.verdict.stats import look_alpha

if TYPE_CHECKING:
    from eagle_lab.engines.arm import Arm  # with it comes torch, for which a pipeline's verdict doesn't wait

Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True)]

# What must hold before a ratio of seconds is told. "same text": the arms' tokens are equal, near ties aside. "time per
# token": the texts may differ, how far is told, and seconds are divided by the new tokens.
Rule = Literal["same text", "time per token"]

# settings that the notebook has no parameter for
BY_PYTHON_ALONE = ("temperature", "top_p", "top_k_sampling", "alpha", "looks", "spans", "pairs_of")


class ComparisonSettings(Part):
    """What a comparison was asked to do; pydantic's ValidationError for counts and thresholds that make none.

    embedded: the default pair, which nothing has to name; load: what else `load` was given; own_prompts: by id, the
    token ids (as text, separated by spaces) of prompts that data/prompts.jsonl lacks; iterations: pairs of whole decodes,
    or instances of cycles in turn; minutes: the time after which no other instance is begun; looks: numbers of
    iterations after which the run may stop; spans: whether the (baseline, candidate) arm is instrumented;
    max_foreign_load: the share of the cores, 0 to 1, above which a pair of whole decodes is dropped. baseline, candidate:
    arms as written, the candidate on top of the baseline; rule: what had to agree; outside: the arms were decoded by
    workers and servers; cluster: the forks were tasks of Ray.
    """

    target: str
    draft: str
    embedded: bool
    device: str
    dtype: str
    load: dict[str, str | bool] = {}
    baseline: str
    candidate: str
    prompts: tuple[str, ...]
    own_prompts: dict[str, str] = {}
    iterations: Count
    forks: Count
    control_forks: Annotated[int, Field(ge=0)]
    max_new_tokens: Count
    top_k: Count
    depth: Count
    total_tokens: Count
    temperature: Number = 0.0
    top_p: Number = 1.0
    top_k_sampling: int = 0
    delta: Annotated[Number, Field(gt=0, lt=1)]
    alpha: Annotated[Number, Field(gt=0, lt=0.5)] = 0.05
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
    looks: tuple[Count, ...] = ()
    pairs_of: PairsOf = "decodes"
    minutes: Annotated[Number, Field(gt=0)] | None = None
    spans: tuple[Annotated[bool, Field(strict=True)], Annotated[bool, Field(strict=True)]] = (False, False)
    max_foreign_load: float
    rule: Rule = "same text"
    outside: bool = False
    cluster: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.outside and self.pairs_of == "cycles":
            raise ValueError(
                "an arm in a process of its own can't be stopped inside a decode; leave pairs_of out."
            )
        check_minutes(self.minutes, self.outside)
        if self.outside and any(self.spans):
            raise ValueError("an arm in a process of its own can't be instrumented; leave spans out.")
        if self.cluster and self.outside:
            raise ValueError("a cluster takes arms that this kit's processes decode; leave cluster out.")
        if self.cluster and self.looks:
            raise ValueError("on a cluster forks don't end in order; leave looks out.")
        if self.forks > self.iterations:
            raise ValueError(
                f"forks is {self.forks}, but {self.iterations} iterations give each fork less than one; lower forks."
            )
        if self.looks:
            look_alpha(self.alpha, self.looks)
            if self.looks[-1] != self.iterations:
                raise ValueError(
                    f"the last look is at {self.looks[-1]} pairs, but {self.iterations} are planned; end looks with "
                    f"{self.iterations}."
                )
        return self


def check_minutes(minutes: float | None, outside: bool) -> None:
    """ValueError for minutes where arms are decoded outside this kit's processes, which don't end by the time."""
    if minutes and outside:
        raise ValueError("minutes is for arms that this kit's processes decode; name iterations instead.")


def asked(**values: Any) -> ComparisonSettings:
    """The settings; ValueError, one sentence, for the first value that makes no comparison."""
    try:
        return ComparisonSettings(**values)
    except ValidationError as error:
        raise ValueError(sentence(error)) from None


def rule_of(baseline: Arm, candidate: Arm) -> Rule:
    """The rule for two arms: the same text where target, arithmetic and sampling are the same and draw alike.

    Not of quantized ones: rounding activations to few bits makes steps of rounding errors, which part texts.
    """
    arms = (baseline, candidate)
    kin = all(arm.engine in ("eagle_lab", "official") and not arm.command for arm in arms)
    alike = {(arm.target, arm.dtype, arm.quantization, arm.sampling) for arm in arms}
    drawn = any(arm.engine == "official" for arm in arms) and baseline.sampling.temperature > 0
    coarse = baseline.quantization != ""
    return "same text" if kin and len(alike) == 1 and not drawn and not coarse else "time per token"


def control_forks(forks: int, pairs_of: PairsOf = "decodes") -> int:
    """A/A control forks: a quarter of the forks; none where this process measures alone (it is provisional anyway), and
    none for cycles, whose every instance brings its control."""
    return math.ceil(forks / 4) if forks > 1 and pairs_of == "decodes" else 0


def again(settings: ComparisonSettings) -> str:
    """The command that runs the comparison again: papermill's, or Python's where the notebook lacks a parameter."""
    pair = ("target", "draft", "device", "dtype")
    plain = (
        "baseline", "candidate", "iterations", *(("minutes",) if settings.minutes else ()), "forks", "max_new_tokens",
        "total_tokens", "depth", "top_k", "delta", "seed", *(("cluster",) if settings.cluster else ()),
    )  # fmt: skip
    value = settings.model_dump() | {"cluster": "auto"}
    usual = {name: field.default for name, field in ComparisonSettings.model_fields.items()}
    # the field's default is that of records from before there was a choice
    usual["pairs_of"] = "decodes" if settings.outside else "cycles"
    unusual = [name for name in BY_PYTHON_ALONE if value[name] != usual[name]]
    prompts = ",".join(settings.prompts)
    # the default pair is what nothing names; random weights of published sizes ("shape:") bring their head
    left_out = pair[:2] if settings.embedded else pair[1:2] if settings.target.startswith("shape:") else ()
    names = [name for name in pair if name not in left_out]
    if unusual or settings.own_prompts or settings.load:
        given = {name: value[name] for name in names} | settings.load
        rest = {name: value[name] for name in (*plain, *unusual)}
        own = {name: f"[{', '.join(text.split())}]" for name, text in settings.own_prompts.items()}
        listed = ", ".join(own.get(name, f"*e.load_prompts({name!r})") for name in settings.prompts)
        what = f"[{listed}]" if own else repr(prompts)
        code = f"import eagle_lab as e; print(e.compare(e.load({_named(given)}), prompts={what}, {_named(rest)}))"
        return shlex.join(["python", "-c", code])
    words = ["papermill", "notebooks/compare.ipynb", "out.ipynb"]
    for name in (*names, *plain):
        words += ["-p", name, str(value[name])]
    return shlex.join([*words, "-p", "prompts", prompts])


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
