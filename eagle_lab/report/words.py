"""Words come last: every text that a reader sees is a jinja2 template in `templates/`, filled from typed data here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from eagle_lab.measure.environment import machine_key


def render(template: str, /, **values: Any) -> str:
    """The text of `templates/NAME`, such as "page.md.j2"; HTML templates escape what is put into them.

    Raises jinja2.UndefinedError for a value that the template wants and nobody gave.
    """
    return ENVIRONMENT.get_template(template).render(**values)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 pair", "20 pairs"; a plural that isn't the noun with an s is given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, end = names
    return f"{', '.join(first)} and {end}" if first else end


def ms(seconds: float) -> str:
    """Seconds as milliseconds with three significant digits, no exponent."""
    return plain(seconds * 1e3)


def us(seconds: float, digits: int = 3) -> str:
    """Seconds as microseconds with so many significant digits, no exponent."""
    return plain(seconds * 1e6, digits)


def plain(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, thousands by commas and never an exponent; "–" for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share * 100:z.{digits}f}%"


def signed_percent(share: float, digits: int = 1) -> str:
    """A share as a percentage with its sign."""
    return f"{share * 100:+z.{digits}f}%"


def interval(low: float, high: float, digits: int = 3) -> str:
    """ "[0.966, 1.050]"; an end that is infinite or unknown is a dash."""
    ends = ("–" if x is None or not math.isfinite(x) else f"{x:.{digits}f}" for x in (low, high))
    return f"[{', '.join(ends)}]"


def spread(ends: tuple[float, float, float]) -> str:
    """Low, middle, high as "12.3 [12.1, 12.6]"; the middle alone where there are too few values for an interval."""
    low, middle, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        return plain(middle)
    return f"{plain(middle)} [{plain(low)}, {plain(high)}]"


def ratio(ends: tuple[float, float, float]) -> str:
    """A ratio's low, middle, high as "0.966 [0.912, 1.050]", or why there is no interval."""
    low, middle, high = ends
    if math.isnan(middle):
        return "no pair was kept"
    known = math.isfinite(low) and math.isfinite(high)
    return f"{middle:.3f} {interval(low, high) if known else '(too few pairs)'}"


def change(ratio: tuple[float, float, float]) -> str:
    """A ratio's low, middle, high as a change in percent: "+0.7% [-3.4, +5.0]"."""
    low, middle, high = ((100 * (x - 1)) for x in ratio)
    if not (math.isfinite(low) and math.isfinite(high)) or ratio[0] == 0:
        return f"{middle:+.1f}%"
    return f"{middle:+.1f}% [{low:+.1f}, {high:+.1f}]"


def table(given: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table: numbers to the right, words to the left; "" for no rows."""
    if not given:
        return ""
    names, rows = list(given[0]), [{name: str(cell) for name, cell in row.items()} for row in given]
    right = [all(_is_number(row[name]) for row in rows) for name in names]
    lines = [
        names,
        ["--:" if number else ":--" for number in right],
        *([row[n] for n in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def brief(command: str) -> str:
    """A command without the token ids of prompts, which its record holds."""
    return re.sub(r"prompts=\[\[.*\]\]", "prompts=[...]", command)


def paired(pairs_of: str) -> str:
    """How the pairs of a comparison were taken: "cycles" or "decodes" in its settings' words, as a reader says it."""
    return "cycles in turn" if pairs_of == "cycles" else "whole decodes"


def folded(command: str, width: int = 96) -> str:
    """A shell command in lines of at most `width` characters: broken before an option and, in a long value, after commas.

    A page would else break it inside words. A command with quotes stays as it is: what they hold must not be broken.
    """
    if "'" in command or '"' in command:
        return command
    lines = [line.strip() for line in _filled(re.split("(?= -)", command), width - 4)]
    return " \\\n  ".join("\\\n".join(_filled(re.split("(?<=,)", line), width - 4)) for line in lines)


def _filled(parts: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return lines


def _is_number(cell: str) -> bool:
    bare = cell.removeprefix("< ")
    return not bare or bare[0] in "0123456789+-–" and " " not in bare


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("eagle_lab.report", "templates"),
    autoescape=jinja2.select_autoescape(enabled_extensions=("html", "html.j2"), default=False),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
FILTERS = (
    count, listed, ms, us, plain, percent, signed_percent, spread, ratio, change, table, brief, paired, folded,
)  # fmt: skip
ENVIRONMENT.filters.update({one.__name__: one for one in FILTERS}, finite=math.isfinite)
ENVIRONMENT.globals.update(interval=interval, machine=machine_key)
