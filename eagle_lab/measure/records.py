"""The record on disk: one typed model a kind, named and numbered, written in one step.

A kind of record is a subclass of `Record` beside the code that measures it:

    class SweepRecord(Record):
        schema_name: Literal["eagle_lab.sweep.v2"] = Field("eagle_lab.sweep.v2", alias="schema")
        settings: SweepSettings
        cells: list[Cell]

    record = SweepRecord(**made(device), settings=settings, cells=[])
    write(record, path)
    record = read(path, SweepRecord)

Raw samples are kept, statistics derived; a value is a field and never a sentence. JSON has no infinities: None stands
for what could not be measured.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_lab import ROOT
from eagle_lab.measure.environment import Cause, Environment, fingerprint, machine_key
from eagle_lab.runtime.checks import sentence

RESULTS = ROOT / "data" / "results"  # records of named machines, committed
OLD_FORM = "17e310d"  # the last commit that reads records of the form before names and numbers


class RecordError(ValueError):
    """A file that is not a readable record of this kit; the message says why."""


class OtherKind(RecordError):
    """A record of another kind than the one that was wanted; kind: its own, such as "sweep"."""

    def __init__(self, path: Path, kind: str, wanted: str) -> None:
        super().__init__(f"{path} is a record of kind {kind}; one of kind {wanted} is wanted here.")
        self.kind = kind


class Part(BaseModel):
    """A part of a record: unknown fields are refused, values can't be changed, NaN and infinities don't exist."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Headed(BaseModel):
    """How every record begins: its schema, when and by which command it was made."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False
    )

    schema_name: str = Field(alias="schema")  # "eagle_lab.KIND.vNUMBER"
    created: datetime
    command: str

    @property
    def kind(self) -> str:
        """The middle of the schema's name, such as "comparison"."""
        return kind_of(self.schema_name)


class Record(Headed):
    """A record of what this kit measured: it knows the machine and the software."""

    environment: Environment

    @property
    def hardware(self) -> str:
        """What it was measured on, by `machine_key`."""
        return machine_key(self.environment)


class Reported(Headed):
    """A record of what other code measured. created: its day, at 0:00; machine: as it was told; commit: the kit's."""

    machine: str
    commit: str

    @property
    def hardware(self) -> str:
        """What it was measured on."""
        return self.machine


class Decoded(Part):
    """Of a record's settings: which pair decoded by which strategy and tree, and what its draws began with."""

    target: str
    draft: str
    dtype: str
    strategy: str
    top_k: int
    depth: int
    total_tokens: int
    seed: int


H = TypeVar("H", bound=Headed)
R = TypeVar("R", bound=Record)
T = TypeVar("T")
PairsOf = Literal["cycles", "decodes"]  # what a comparison times in turn
Side = Literal["baseline", "candidate"]


class Difference(Part):
    """Where two decodes of one prompt part. Two that give the same tokens have no difference: None.

    position: index into the new tokens; left and right: the ids there, None where that decode had already ended;
    margin: how far the worse of the two choices falls short of the choice of the pair's target, where one is that choice
    the distance of the two; tolerance: what the arithmetic's error allows, None where an arm decodes another target or in
    another arithmetic than the pair's, so that the margin is told and judges nothing; both None where one decode had
    ended. They are logits for greedy decoding and probabilities when sampling, where a uniform number against the
    cumulative distribution makes the choice. "text": one decode gave its text and no ids, and left is the other's first
    id after what they share.
    """

    position: int
    left: int | None
    right: int | None
    margin: float | None
    tolerance: float | None
    unit: Literal["logit", "probability", "text"] = "logit"

    @property
    def tie(self) -> bool:
        """Whether the arithmetic's error explains the difference."""
        return self.margin is not None and self.tolerance is not None and self.margin <= self.tolerance

    def __str__(self) -> str:
        """The bare numbers: "new token 6: 288 and 281, logit margin 0.125, tolerance 0.295"."""
        at = f"new token {self.position}"
        if self.unit == "text":
            return f"the texts part at {at}"
        if self.margin is None and None not in (self.left, self.right):
            return f"{at}: {self.left} and {self.right}"
        if self.margin is None:
            return f"{at}: one decode ends there and the other goes on"
        allowed = "" if self.tolerance is None else f", tolerance {self.tolerance:.3g}"
        return f"{at}: {self.left} and {self.right}, {self.unit} margin {self.margin:.3g}{allowed}"


class Counts(Part):
    """Cycles of a decode and the tokens that they committed, the bonus of the last one not counted."""

    cycles: int
    committed: int


class Sample(Part):
    """One timed pair of whole decodes: a prompt decoded by both arms, one directly after the other. Times in seconds.

    A control decodes the baseline twice. new_tokens and cycles: the baseline's; candidate_tokens: the candidate's, as many
    where None; counts: by arm, None where an engine doesn't tell; first_s: of the seconds, each arm's prefill and first
    cycle (None: not told apart); gap_s: by arm, the median time between two pieces of a stream;
    foreign_load: share of this machine's cores that other programs took, 0 to 1; dropped: why the pair doesn't count,
    empty where it does; difference: where the arms' texts part, None where they are the same.
    """

    fork: int
    iteration: int
    prompt: str
    control: bool
    order: Literal["baseline first", "candidate first"]
    baseline_s: float = Field(gt=0)
    candidate_s: float = Field(gt=0)
    new_tokens: int
    cycles: int | None
    candidate_tokens: int | None = None
    counts: tuple[Counts | None, Counts | None] | None = None
    first_s: tuple[float, float] | None = None
    gap_s: tuple[float | None, float | None] = (None, None)
    foreign_load: float
    dropped: tuple[Cause, ...] = ()
    difference: Difference | None = None


class InstanceSample(Part):
    """One instance: a prompt decoded in lock-step by several sessions that were made anew for it. Times in seconds.

    Sessions 0 and 1 are the baseline, twice, as a control; the others are what is held against it, in a comparison the
    candidate. made: the sessions in the order in which they were made; first_s: each one's set-up, prefill and first
    cycle, which no stretch has; seconds [stretch][session]: each session's time for a stretch of text, at whose ends all
    stand at one place; order [stretch]: which session stepped, cycle by cycle (empty: each once, not noted); tokens
    [stretch]: the stretch's length; slices [stretch][session]: what the seconds are the sum of, where the sessions took turns
    inside their cycles too; order then tells who began first. foreign_load, dropped and difference as in `Sample`.
    """

    fork: int = 0
    iteration: int = 0
    prompt: str
    made: tuple[int, ...]
    first_s: tuple[float, ...]
    seconds: tuple[tuple[Annotated[float, Field(gt=0)], ...], ...]
    order: tuple[tuple[int, ...], ...] = ()
    tokens: tuple[int, ...]
    slices: tuple[tuple[tuple[Annotated[float, Field(gt=0)], ...], ...], ...] = ()
    foreign_load: float
    dropped: tuple[Cause, ...] = ()
    difference: Difference | None = None

    def cycles(self, session: int) -> int:
        """Cycles of a session in all stretches."""
        return sum(steps.count(session) for steps in self.order) if self.order else len(self.seconds)

    def of(self, sessions: Sequence[int]) -> InstanceSample:
        """What some of the sessions took, numbered anew in the order given, as if no other had stepped between them."""
        place = {session: number for number, session in enumerate(sessions)}

        def steps(order: Sequence[int]) -> tuple[int, ...]:
            return tuple(place[session] for session in order if session in place)

        def theirs(row: Sequence[T]) -> tuple[T, ...]:
            return tuple(row[session] for session in sessions)

        return self.model_copy(
            update={
                "made": steps(self.made), "first_s": theirs(self.first_s), "seconds": tuple(map(theirs, self.seconds)),
                "order": tuple(map(steps, self.order)), "slices": tuple(map(theirs, self.slices)),
            }
        )  # fmt: skip


class PartCalls(Part):
    """Seconds of each call of the part that the arms differ in, in one instrumented decode of one arm."""

    fork: int
    arm: Side
    prompt: str
    cycles: int
    calls_s: tuple[float, ...]


class Place(Part):
    """Where a fork ran on a cluster. machine: its host's name; node: the first 8 digits of Ray's id of the node."""

    fork: int
    machine: str
    node: str
    environment: Environment


class ForkLost(Part):
    """A fork on a cluster that ended early; its finished pairs are kept. machine and node: None where it had not begun;
    said: the error that it raised; anew: the fork that took what was left, None where nothing did."""

    event: Literal["fork lost"] = "fork lost"
    fork: int
    machine: str | None
    node: str | None
    why: Literal["node died", "process died", "raised"]
    said: str | None = None
    anew: int | None = None


def made(device: str = "cpu") -> dict[str, Any]:
    """`created`, `command` and `environment` of a record that is begun now."""
    return {"created": now(), "command": command_line(), "environment": fingerprint(device)}


def now() -> datetime:
    """The time, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


# a path from the root, from a home or out of the working folder: a word, or a value in one such as draft=PATH,top_k=4
_ELSEWHERE = re.compile(r"(?<![^=,])(?:/|~|\.\.(?=/))[^=,]*")


def command_line() -> str:
    """How this process was started, without folders: a record must not tell where on a disk it was made."""
    program = Path(sys.argv[0])
    own = "python -m eagle_lab" + ("" if program.stem == "__main__" else f".{program.stem}")
    name = own if program.is_relative_to(ROOT / "eagle_lab") else program.name
    return " ".join([name, *(_ELSEWHERE.sub(lambda path: Path(path[0]).name, a) for a in sys.argv[1:])])


def check_folder(folder: str | Path) -> Path:
    """Make a results folder and prove that it can be written; ValueError says why not."""
    if not isinstance(folder, str | Path):
        raise ValueError(f"results_dir is {folder!r}; it must be the name of a folder.")
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"results folder {folder} cannot be written ({error.strerror}); name another results_dir."
        ) from None
    return folder


def write(record: Headed, path: str | Path) -> None:
    """Replace the file by the record in one step: a reader, or a crash, sees the old one or the new one whole."""
    write_json(record.model_dump(mode="json"), path)
    lines_beside(path).unlink(missing_ok=True)  # `read` passes over a line that the record has already


def append(record: Record, path: str | Path, field: str, item: Part) -> None:
    """Add `item` to the record's list `field`, and to the disk as one JSON line beside the file that `write` made.

    `read` joins the lines to the record; the next `write` settles them into it. A crash loses at most this item.
    """
    getattr(record, field).append(item)
    line = json.dumps({field: item.model_dump(mode="json")}, allow_nan=False)
    with open(lines_beside(path), "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_beside(path: str | Path) -> Path:
    """Where a record that still grows keeps what `append` added."""
    return Path(path).with_suffix(".jsonl")


# a list of nothing but numbers; a line's end is never inside a string of JSON
_NUMBERS = re.compile(r"\[(?:\n *(?:-?\d[-+.\deE]*|null),?)+\n *\]")


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + " ".join(numbers[0][1:-1].split()) + "]"


def write_json(value: Mapping[str, Any], path: str | Path) -> None:
    """Replace the file by the JSON of `value` in one step; ValueError for NaN and infinities."""
    path = Path(path)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("x", encoding="utf-8") as file:  # its mode is the umask's
            file.write(_NUMBERS.sub(_on_one_line, json.dumps(value, indent=1, allow_nan=False)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def kind_of(schema: str) -> str:
    """The middle of a schema's name, such as "comparison" of "eagle_lab.comparison.v2"."""
    return schema.removeprefix("eagle_lab.").rpartition(".")[0] or schema


def schema_of(path: str | Path) -> str:
    """The schema's name in a record's file; RecordError says why the file is no record that this version reads."""
    return _load(Path(path))["schema"]


def read(path: str | Path, kind: type[H]) -> H:
    """A record of a kind from its file; RecordError says in one sentence what is wrong with it, OtherKind which kind it is."""
    path = Path(path)
    found = _load(path)
    wanted = kind.model_fields["schema_name"].default
    if kind_of(found["schema"]) != kind_of(wanted):
        raise OtherKind(path, kind_of(found["schema"]), kind_of(wanted))
    if found["schema"] != wanted:
        form, ours = (schema.rpartition(".")[2] for schema in (found["schema"], wanted))
        raise RecordError(
            f"{path} is a record of kind {kind_of(wanted)} in form {form}; this version reads {ours}."
        )
    _join(found, lines_beside(path))
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise RecordError(f"{path} is no whole {kind_of(wanted)} record: {sentence(error)}") from None


def _join(found: dict[str, Any], path: Path) -> None:
    """Add the lines of a record that grew; the last one may be torn, and a crash may have left some that it has."""
    if not path.exists():
        return
    lists = {field: items for field, items in found.items() if isinstance(items, list)}
    known = {field: {json.dumps(item, sort_keys=True) for item in items} for field, items in lists.items()}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            ((field, item),) = json.loads(line).items()
        except ValueError as error:
            raise RecordError(f"{path} is not JSON in line {number} ({error}).") from None
        text = json.dumps(item, sort_keys=True)
        if text not in known.setdefault(field, set()):
            known[field].add(text)
            found.setdefault(field, []).append(item)


def header(path: str | Path) -> Record | Reported:
    """What every record has, of a record of any kind; RecordError as for `read`."""
    found = _load(Path(path))
    kind, own = (Reported, ("machine", "commit")) if "machine" in found else (Record, ("environment",))
    try:
        return kind.model_validate({name: found.get(name) for name in ("schema", "created", "command", *own)})
    except ValidationError as error:
        raise RecordError(f"{path} is no whole record: {sentence(error)}") from None


def read_all(folder: str | Path, kind: type[H]) -> tuple[dict[Path, H], list[str]]:
    """All records of a kind below a folder, and one sentence for each JSON file that is no record at all."""
    found, skipped = {}, []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            if schema_of(path) == kind.model_fields["schema_name"].default:
                found[path] = read(path, kind)
        except RecordError as error:
            skipped.append(str(error))
    return found, skipped


def machine_slug(environment: Environment) -> str:
    """A short name of the machine for file names: "cpu", or the GPU's model such as "h100"."""
    if not environment.gpu:
        return "cpu"
    words = re.sub(r"[^a-z0-9]+", "-", machine_key(environment).lower()).strip("-").split("-")
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), words[-1])


def target_slug(name: str) -> str:
    """A short name of a target for file names: its last part, in lower case."""
    return re.sub(r"[^a-z0-9.]+", "-", name.removeprefix("shape:").rpartition("/")[2].lower()).strip("-")


def kept_at(kind: str, environment: Environment, target: str, folder: Path = RESULTS) -> Path:
    """Where the record of one machine and target is kept: KIND-MACHINE-TARGET.json."""
    return folder / f"{kind}-{machine_slug(environment)}-{target_slug(target)}.json"


def record_path(record: Record, folder: Path = RESULTS) -> Path:
    """Where a record is kept whose settings have a `target`."""
    return kept_at(record.kind, record.environment, record.settings.target, folder)  # type: ignore[attr-defined]


def committed(kind: type[R], folder: Path = RESULTS) -> dict[str, R]:
    """The records of a kind in data/results, by machine and target such as "h100-llama-3.1-8b"."""
    name = kind.model_fields["schema_name"].default.split(".")[1]
    return {
        path.stem.removeprefix(f"{name}-"): read(path, kind) for path in sorted(folder.glob(f"{name}-*.json"))
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path} is not there.") from None
    except IsADirectoryError:
        raise RecordError(f"{path} is a folder; name a record in it.") from None
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise RecordError(f"{path} is empty.") from None
        # the place of an unterminated string is its start
        if error.pos >= len(error.doc.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
            raise RecordError(f"{path} ends in the middle: was the run or the copy interrupted?") from None
        raise RecordError(f"{path} is not JSON ({error}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} can't be read ({error}).") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise RecordError(f"{path} is JSON, but not a record of this kit (it has no schema).")
    if not isinstance(found["schema"], str):
        raise RecordError(
            f"{path} has the form before schemas had names; eagle_lab at commit {OLD_FORM} reads it."
        )
    return found
