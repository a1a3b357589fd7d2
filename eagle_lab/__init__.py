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

Folders import only downward: runtime, models, decode, engines, measure, verdict and train, studies, report, notebook;
docs/architecture.md is their map. On the command line: `python -m eagle_lab --help`. Importing the package is cheap: a
name brings its module, and with it torch, when it is first used.
"""

from __future__ import annotations

from pathlib import Path

import lazy_loader

ROOT = Path(__file__).resolve().parents[1]  # the checkout: data/, notebooks/ and README.md lie in it

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
