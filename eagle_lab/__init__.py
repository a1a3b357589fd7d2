"""Does this change make EAGLE-3 decoding faster, and is the answer to be trusted?

EAGLE-3 speculative decoding lets a small draft head propose a tree of tokens that the target model then verifies in
one forward. This package decodes with it, switches parts of it by name, times two choices in pairs, and judges.

    import eagle_lab
    pair = eagle_lab.load()                       # the embedded SmolLM2-135M-Instruct and its draft head
    ids = eagle_lab.encode(pair.tokenizer, "Why is the sky blue?")
    out = eagle_lab.generate(pair, ids, 50, strategy="doubling")
    print(pair.tokenizer.decode(out.tokens), out.acceptance_length)
    print(eagle_lab.compare(pair, baseline="rebuild", candidate="doubling", iterations=20))

Where to look next
    load, Pair                        a target and its draft head, from a hub name or a local folder
    generate, stream, generate_plain  decoding; each cycle's tree, its acceptance and its bonus token
    Strategy, MASK_BUILDERS           what can be switched by name; `mask_builder` adds a builder of your own
    compare, Comparison               the paired comparison; its record lies on disk, sample by sample
    judge, Verdict, Decision          from pairs of seconds to ADOPT, REVERT, NO_DIFFERENCE or INCONCLUSIVE
    save_draft                        writes a head in each of the three published dialects

Modules import only downward: tree, clock, stats and environment at the bottom; masks, cache and draft above them;
models, decode, measure, compare, charts and report on top. On the command line: `python -m eagle_lab --help`.
Importing the package is cheap: a name brings its module, and with it torch, when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_HOMES` does at run time, for editors and type checkers
    from eagle_lab.decode.generate import Cycle, Generation, generate, generate_plain, stream
    from eagle_lab.decode.masks import MASK_BUILDERS, mask_builder
    from eagle_lab.decode.strategy import Strategy
    from eagle_lab.models.checkpoints import save_draft
    from eagle_lab.models.pair import Pair, load
    from eagle_lab.models.prompts import encode, load_prompts
    from eagle_lab.verdict.compare import Comparison, compare
    from eagle_lab.verdict.stats import Decision, Verdict, judge

ROOT = Path(__file__).resolve().parents[1]  # the checkout: data/, notebooks/ and README.md lie in it

__all__ = [
    "MASK_BUILDERS", "Comparison", "Cycle", "Decision", "Generation", "Pair", "Strategy", "Verdict", "compare", "encode",
    "generate", "generate_plain", "judge", "load", "load_prompts", "mask_builder", "save_draft", "stream",
]  # fmt: skip

_HOMES = {
    "models.pair": ("Pair", "load"),
    "decode.generate": ("Cycle", "Generation", "generate", "generate_plain", "stream"),
    "decode.strategy": ("Strategy",),
    "decode.masks": ("MASK_BUILDERS", "mask_builder"),
    "verdict.compare": ("Comparison", "compare"),
    "verdict.stats": ("Decision", "Verdict", "judge"),
    "models.prompts": ("encode", "load_prompts"),
    "models.checkpoints": ("save_draft",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        found = getattr(import_module(f"eagle_lab.{_HOME_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"eagle_lab.{name}"):
        found = import_module(f"eagle_lab.{name}")
    else:
        raise AttributeError(f"module 'eagle_lab' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `eagle_lab.compare` the function: importing the module of that name would put itself in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
