"""All records of one machine: what `python -m eagle_lab record` measures and writes to data/results/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.records import RESULTS, check_folder, record_path, write
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt
from eagle_lab.studies.operators import operators_of_any
from eagle_lab.studies.profile import ProfileRecord, get_prompts, profile, profile_prompts, stated_acceptance
from eagle_lab.studies.whatif import check_whatif, whatif

Where = Literal["host", "device"]

GPU_TARGETS = ("", "shape:llama-3.1-8b")  # "" is the embedded default
WHATIFS: tuple[tuple[str, Where], ...] = (("tree_mask", "host"), ("draft", "host"), ("target", "host"))
DEVICE_WHATIFS: tuple[tuple[str, Where], ...] = (("draft", "device"), ("target", "device"))


def full_profile(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    whatifs: Sequence[tuple[str | None, Where]] = (),
    iterations: int = 8,
    whatif_tokens: int = 12,
    delay_ms: float = 0.0,
    trace: str | Path | None = None,
    **settings: Any,
) -> ProfileRecord:
    """A profile, what torch.profiler sees, and a what-if for each (stage, where); settings as for `profile`.

    A stage that is None is chosen (see `whatif.check_whatif`). Raises ValueError for a what-if that the strategy or the
    device can't have, before anything is measured.
    """
    asked = [
        (check_whatif(pair, decoding.strategy, stage, where, iterations, delay_ms), where)
        for stage, where in whatifs
    ]
    record = profile(pair, prompts, decoding, **settings)
    seed = record.settings.seed
    ready = profile_prompts(pair, prompts, seed=seed)
    record.operators = operators_of_any(pair, ready, decoding, trace=trace)
    record.whatif = [
        whatif(
            pair, ready, record, stage=stage, where=where, delay_ms=delay_ms, iterations=iterations,
            max_new_tokens=whatif_tokens, seed=seed,
        )
        for stage, where in asked
    ]  # fmt: skip
    return record


def machine_profile(pair: Pair, max_new_tokens: int = 50) -> ProfileRecord:
    """The profile that is kept of a machine, with all its what-ifs."""
    # A CPU's cycle takes ten times a GPU's, so it gets fewer of them: about three minutes in all. With random weights
    # nearly every token is a cycle of its own, so fewer decodes hold as many cycles.
    quick, stated = pair.device.type == "cuda", stated_acceptance(pair)
    return full_profile(
        pair,
        get_prompts(pair, 4 if quick and not stated else 3),
        Decoding.of(max_new_tokens),
        whatifs=(*WHATIFS, *DEVICE_WHATIFS) if quick else WHATIFS,
        iterations=20,
        whatif_tokens=(8 if stated else 16) if quick else 12,
        acceptance=f"stated {stated:g}" if stated else "measured",
        repeats=2 if quick and not stated else 1,
    )


def targets(target: str) -> tuple[str, ...]:
    """The targets of a command: "all" of `GPU_TARGETS`, "default" (the embedded one, ""), or one by its name."""
    return {"all": GPU_TARGETS, "default": ("",)}.get(target, (target,))


def profiles(
    device: str,
    target: str = "all",
    draft: str | None = None,
    max_new_tokens: int = 50,
    folder: Path = RESULTS,
) -> None:
    """Profile each target on this machine, with all its what-ifs, and write the records to `folder`."""
    check_folder(folder)
    for name in targets(target):
        record = machine_profile(load(name or None, draft or None, device=device), max_new_tokens)
        write(record, record_path(record, folder))
