"""Sampling is lossless: EAGLE-3's tokens have exactly the target's distribution.

Synthetic trees with known probabilities, over 200,000 draws and by conditionals; against the sequential rejection rule;
and the joint distribution of the first three tokens end to end. The probability of a chi-square at least as large is
asked to be above 1e-4: with fixed seeds a run either always passes or always fails.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chisquare

from eagle_lab.decode.generate import draw_uniforms, generate, generate_plain
from eagle_lab.decode.masks import rebuild
from eagle_lab.decode.sampling import Sampling, accept, choose
from eagle_lab.decode.tree import depths_of

DRAWS = 240_000
LEAST = 1e-4
PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]

# Trees over the vocabulary 0…4, as (tokens, parents): a chain, a bush, one with every first token, and the root alone
TREES = {
    "chain": ([0, 2, 1, 3], [0, 1, 2]),
    "bush": ([0, 1, 3, 2, 0, 1, 4, 2], [0, 0, 1, 1, 2, 4, 4]),
    "all-children": ([0, 0, 1, 2, 3, 4, 2], [0, 0, 0, 0, 0, 3]),
    "unlikely-child": ([0, 4], [0]),
}
VOCABULARY, LENGTH = 5, 3


def context_logits():
    """Logits of a made-up target of memory 2: [last but one, last, next], spread over e^±2."""
    torch.manual_seed(1)
    return torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, dtype=torch.float64) * 1.2


def node_logits(tokens, parents, table):
    """The target's logits at each node: they depend on its token and its parent's (the root follows token 0)."""
    before = [0, *(tokens[parent] for parent in parents)]
    return torch.stack([table[b, t] for b, t in zip(before, tokens, strict=True)])


def draw_sequences(tokens, parents, sampling, draws, seed):
    """The first LENGTH new tokens of many decodes: one cycle on the tree, then plain sampling, int64 [draws, LENGTH]."""
    table, nodes = context_logits(), len(tokens)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(draws, LENGTH + 6, dtype=torch.float64, generator=generator)
    depths = torch.tensor(depths_of(parents)).expand(draws, -1)
    logits = node_logits(tokens, parents, table).expand(draws, nodes, VOCABULARY)
    choice = choose(logits, sampling, uniforms.gather(1, depths))[0]
    batch = torch.tensor([tokens]).expand(draws, -1)
    mask = rebuild(torch.tensor(parents)).expand(draws, -1, -1)
    width = max(depths_of(parents)) + 1
    path, count = accept(batch, torch.tensor([parents]).expand(draws, -1), mask, depths, choice, width)
    followed = choice.gather(1, path)
    found = torch.zeros(draws, LENGTH, dtype=torch.int64)
    for place in range(LENGTH):
        inside = place < count
        given = followed[:, min(place, width - 1)]
        last = found[:, place - 1] if place else torch.zeros(draws, dtype=torch.int64)
        older = found[:, place - 2] if place > 1 else torch.zeros(draws, dtype=torch.int64)
        plain = choose(table[older, last], sampling, uniforms[:, place])[0]
        found[:, place] = torch.where(inside, given, plain)
    return found


def exact(sampling):
    """The target's own joint distribution of the first LENGTH tokens, [V] * LENGTH."""
    from eagle_lab.decode.sampling import distribution

    p = distribution(context_logits(), sampling)
    return torch.einsum("a,ab,abc->abc", p[0, 0], p[0], p)


def chi_square(counts, probabilities):
    """P-value of counts against probabilities, cells with fewer than five expected put together."""
    counts, expected = counts.flatten().double(), probabilities.flatten() * counts.sum()
    assert not bool(counts[expected == 0].any()), "something was drawn that has probability 0"
    rare = (expected < 5) & (expected > 0)
    big = expected >= 5
    cells, wanted = counts[big].tolist(), expected[big].tolist()
    if bool(rare.any()):
        cells.append(float(counts[rare].sum()))
        wanted.append(float(expected[rare].sum()))
    return chisquare(cells, wanted).pvalue if len(cells) > 1 else 1.0


def joint(found):
    index = (found[:, 0] * VOCABULARY + found[:, 1]) * VOCABULARY + found[:, 2]
    return torch.bincount(index, minlength=VOCABULARY**3).view(VOCABULARY, VOCABULARY, VOCABULARY)


SETTINGS = [Sampling(1.0), Sampling(0.7, top_p=0.85), Sampling(1.3, top_k_sampling=3)]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["plain", "top-p", "top-k"])
@pytest.mark.parametrize("name", TREES)
def test_joint_distribution_and_conditionals_on_synthetic_trees(name, sampling):
    counts = joint(draw_sequences(*TREES[name], sampling, DRAWS, seed=2))
    wanted = exact(sampling)
    assert chi_square(counts, wanted) > LEAST
    assert chi_square(counts.sum((1, 2)), wanted.sum((1, 2))) > LEAST
    for first in range(VOCABULARY):  # what follows each first token, whether it was drafted or not
        if counts[first].sum() > 100:
            assert chi_square(counts[first], wanted[first] / wanted[first].sum()) > LEAST, f"after {first}"


def test_the_chi_square_would_find_a_bias():
    """One draft accepted a percent too often, and a uniform number used twice: both are found."""
    found = draw_sequences(*TREES["bush"], Sampling(1.0), DRAWS, seed=2)
    wanted = exact(Sampling(1.0))
    biased = found.clone()
    flip = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0)) < 0.01
    biased[flip, 0] = 1
    assert chi_square(joint(biased), wanted) < 1e-9
    table, uniforms = context_logits(), torch.rand(DRAWS, dtype=torch.float64)
    first = choose(table[0, 0].expand(DRAWS, -1), Sampling(1.0), uniforms)[0]
    second = choose(table[0, first], Sampling(1.0), uniforms)[0]
    third = choose(table[first, second], Sampling(1.0), torch.rand(DRAWS, dtype=torch.float64))[0]
    assert chi_square(joint(torch.stack((first, second, third), 1)), wanted) < 1e-9


def sequential_rejection(p, children, generator, draws):
    """The rule as published: children in order, x kept with probability p(x), else p(x) = 0 and renormalise."""
    left = p.expand(draws, -1).clone()
    result = torch.full((draws,), -1)
    for child in children:
        share = left[:, child] / left.sum(-1)
        kept = (result < 0) & (torch.rand(draws, dtype=torch.float64, generator=generator) < share)
        result[kept] = child
        left[:, child] = torch.where(result < 0, 0.0, left[:, child])
    rest = torch.multinomial(left.clamp(min=1e-300), 1, generator=generator)[:, 0]
    return torch.where(result < 0, rest, result)


@pytest.mark.parametrize("children", [[2], [0, 3], [4, 1, 0], [3, 2, 1, 0, 4]])
def test_one_draw_a_node_is_the_sequential_rejection_rule(children):
    """Both have the distribution p, and so accept each child equally often: with probability p(child)."""
    p = context_logits()[0, 0].softmax(-1)
    generator = torch.Generator().manual_seed(9)
    rule = torch.bincount(sequential_rejection(p, children, generator, DRAWS), minlength=VOCABULARY)
    uniforms = torch.rand(DRAWS, dtype=torch.float64, generator=generator)
    ours = torch.bincount(choose(p.log().expand(DRAWS, -1), Sampling(1.0), uniforms)[0], minlength=VOCABULARY)
    assert chi_square(rule, p) > LEAST and chi_square(ours, p) > LEAST
    taken = [float(counts[children].sum()) / DRAWS for counts in (rule, ours)]
    assert taken == pytest.approx([float(p[children].sum())] * 2, abs=4 * (0.25 / DRAWS) ** 0.5)


# --- end to end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.4, "top_k_sampling": 20},
        {"temperature": 0.9, "top_p": 0.7, "top_k_sampling": 50},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_gives_plain_samplings_tokens(tiny_pair, options, seed):
    """Common random numbers: whatever the tree and the strategy, the tokens are those of plain sampling."""
    plain = generate_plain(tiny_pair, PROMPT, 24, seed=seed, **options).tokens
    small = {"top_k": 3, "depth": 2, "total_tokens": 9}
    assert generate(tiny_pair, PROMPT, 24, seed=seed, **options).tokens == plain
    assert (
        generate(
            tiny_pair, PROMPT, 24, seed=seed, strategy="doubling,attention=eager", **small, **options
        ).tokens
        == plain
    )


def test_seeds_matter_and_repeat(tiny_pair):
    texts = [
        tuple(generate(tiny_pair, PROMPT, 20, temperature=1.0, seed=seed).tokens) for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_positions_draw_the_same_numbers_however_long_the_run(tiny_pair):
    short, long = (draw_uniforms(tiny_pair, count, Sampling(1.0), 5) for count in (7, 900))
    assert torch.equal(short, long[:, :7])


def test_drafts_are_accepted_when_sampling(tiny_pair):
    cycles = generate(tiny_pair, PROMPT, 60, temperature=0.3, seed=3).cycles
    assert sum(len(c.committed) for c in cycles) > 1.2 * len(cycles), "nothing accepted, nothing tested"


@pytest.mark.slow
def test_joint_distribution_of_the_first_three_tokens_end_to_end(tiny_pair):
    """EAGLE-3 on the tiny pair, many seeds at once, against the exact probabilities of the target's own forwards.

    top_k_sampling = 3 keeps 27 sequences, whose exact probabilities 13 forwards give.
    """
    draws, keep = 12_000, 3
    sampling = Sampling(1.0, top_k_sampling=keep)
    exact_p = exact_joint(tiny_pair, sampling)
    assert len(exact_p) == keep**3
    counts = dict.fromkeys(exact_p, 0)
    accepted = 0
    for tokens, paths in batched_decodes(tiny_pair, sampling, draws, rows=1500):
        accepted += paths
        for sequence in map(tuple, tokens.tolist()):
            counts[sequence] += 1  # a KeyError is a token that the target never gives
    assert accepted > 0.2 * draws, "too few drafts were accepted for this to test acceptance"
    keys = list(exact_p)
    p = torch.tensor([exact_p[key] for key in keys], dtype=torch.float64)
    assert chi_square(torch.tensor([counts[key] for key in keys]), p) > LEAST


def exact_joint(pair, sampling):
    """Probability of each sequence of three new tokens, by transformers' own forwards without a cache."""
    from eagle_lab.decode.sampling import distribution

    def following(new):
        with torch.inference_mode():
            p = distribution(pair.target(torch.tensor([PROMPT + list(new)])).logits[0, -1], sampling)
        return {int(t): float(p[t]) for t in p.nonzero()[:, 0]}

    found = {}
    for a, pa in following([]).items():
        for b, pb in following([a]).items():
            for c, pc in following([a, b]).items():
                found[a, b, c] = pa * pb * pc
    return found


def batched_decodes(pair, sampling, draws, rows):
    """First three tokens of `draws` EAGLE-3 decodes with independent numbers, `rows` at a time → (tokens, accepted)."""
    from eagle_lab.decode.session import new_session
    from eagle_lab.decode.strategy import parse
    from eagle_lab.decode.tree import TreeShape
    from eagle_lab.runtime.clock import no_span

    shape, plan = TreeShape(3, 2, 8), parse("mask=doubling")
    length = len(PROMPT)
    slots = length + 3 + 2 * shape.reach + 2 * shape.width
    generator = torch.Generator().manual_seed(17)
    with torch.inference_mode():
        for _ in range(draws // rows):
            ready = new_session(pair, plan, shape, sampling, rows, slots)
            ready.prepare()
            uniforms = torch.rand(ready.state.uniforms.shape, dtype=torch.float64, generator=generator)
            # the prompt is read once; its rows are copied, and each row draws its own first token
            one = new_session(pair, plan, shape, sampling, 1, slots)
            one.prepare()
            state = ready.state
            firsts = first_tokens(pair, sampling, uniforms[:, length])
            for first in firsts.unique():
                chosen = firsts == first
                number = uniforms[chosen][:1]
                one.reset()
                one.prefill(0, torch.tensor([PROMPT]), number)
                assert one.state.root.item() == first
                for mine, its in (
                    (state.target_cache, one.state.target_cache),
                    (state.head_cache, one.state.head_cache),
                ):
                    for device, buffer in mine.buffers.items():
                        buffer[:, :, chosen] = its.buffers[device].expand(
                            -1, -1, int(chosen.sum()), -1, -1, -1
                        )
                state.hidden[chosen] = one.state.hidden
            state.root.copy_(firsts)
            state.length.fill_(length)
            state.uniforms.copy_(uniforms)
            state.visible_length = length
            tokens, accepted = firsts[:, None].new_full((rows, 12), -1), 0
            filled = torch.zeros(rows, dtype=torch.int64)
            for _ in range(2):
                out = ready.step(no_span)
                count, committed = out.count, out.committed
                place = filled[:, None] + torch.arange(committed.shape[1])
                keep = torch.arange(committed.shape[1]) < count[:, None]
                row = torch.arange(rows)[:, None].expand_as(place)
                tokens[row[keep], place[keep]] = committed[keep]
                filled += count
                tokens[torch.arange(rows), filled] = out.bonus
                accepted += int((count > 1).sum())
                state.visible_length += int(count.max())
            yield tokens[:, :3], accepted


def first_tokens(pair, sampling, uniforms):
    logits = pair.target(torch.tensor([PROMPT])).logits[0, -1]
    return choose(logits.expand(len(uniforms), -1), sampling, uniforms)[0]


def test_the_exact_probabilities_add_up(tiny_pair):
    found = exact_joint(tiny_pair, Sampling(1.0, top_k_sampling=3))
    assert sum(found.values()) == pytest.approx(1.0)
    assert len(set(itertools.chain(*found))) > 3
