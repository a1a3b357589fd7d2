# What the package offers, once for Python (lazy_loader reads this file) and for editors.
import pathlib

from .decode.generate import Cycle, Generation, generate, generate_plain, stream
from .decode.masks import MASK_BUILDERS, mask_builder
from .decode.strategy import Strategy
from .models.checkpoints import save_draft
from .models.pair import Pair, load
from .models.prompts import encode, load_prompts
from .verdict.compare import Comparison, compare
from .verdict.stats import Decision, Verdict, judge

ROOT: pathlib.Path

__all__ = [
    "MASK_BUILDERS", "Comparison", "Cycle", "Decision", "Generation", "Pair", "Strategy", "Verdict", "compare", "encode",
    "generate", "generate_plain", "judge", "load", "load_prompts", "mask_builder", "save_draft", "stream",
]  # fmt: skip
