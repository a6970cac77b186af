"""From logits to tokens for all running texts at once.

Most texts take the largest logit. Those with processors or sampling are chosen together before anything
is sent to the host; beam searches advance in groups of equal width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.generation.beam_search import BeamSearch, Candidate
from blip2_actor.generation.logits_processors import process
from blip2_actor.generation.sampling import draw
from blip2_actor.generation.search import TextSearch
from blip2_actor.transfer import to_device

CHOSEN_AT_ONCE = 128
"""Texts whose processors run in one piece: sorting takes several times the memory of their scores."""

Texts = Sequence[tuple[TextSearch, int]]
"""Texts with the row of the logits that is theirs."""


def advance(
    logits: Tensor, searches: Sequence[tuple[TextSearch | BeamSearch, list[int]]]
) -> list[list[int] | None]:
    """Let every search take one step.

    Args:
        logits: [rows, V] in any dtype.
        searches: with the rows that are theirs.

    Returns:
        For each search: None, or for each of its slots the index of the slot whose text it continues.
    """
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    texts: list[tuple[TextSearch, int]] = []
    beams: dict[int, list[tuple[int, BeamSearch, list[int]]]] = defaultdict(list)
    for index, (search, rows) in enumerate(searches):
        if isinstance(search, BeamSearch):
            beams[search.num_slots].append((index, search, rows))
        else:
            texts.append((search, rows[0]))
    if texts:
        _advance_texts(logits, logprobs, texts)
    parents: list[list[int] | None] = [None] * len(searches)
    for group in beams.values():
        indices, own_searches, own_rows = zip(*group, strict=True)
        for index, found in zip(indices, _advance_beams(logprobs, own_searches, own_rows), strict=True):
            parents[index] = found
    return parents


def _advance_texts(logits: Tensor, logprobs: Tensor, texts: Texts) -> None:
    next_ids = logits.max(dim=-1).indices
    chosen = [text for text in texts if not text[0].takes_largest]
    for start in range(0, len(chosen), CHOSEN_AT_ONCE):
        _choose(logits, next_ids, chosen[start : start + CHOSEN_AT_ONCE])
    ids, own_logprobs = _to_host(next_ids, logprobs)
    end_ids = texts[0][0].vocabulary.end_ids
    early = [
        row for search, row in texts if ids[row] in end_ids and search.takes_largest and search.must_go_on
    ]
    if early:
        rows, ends = to_device(early, logits.device), to_device(list(end_ids), logits.device)
        others = logits[rows].index_fill_(1, ends, float("-inf")).max(dim=-1).indices
        for row, token_id, logprob in zip(early, *_to_host(others, logprobs[rows]), strict=True):
            ids[row], own_logprobs[row] = token_id, logprob
    for search, row in texts:
        search.accept(ids[row], own_logprobs[row])


def _choose(logits: Tensor, ids: Tensor, texts: Texts) -> None:
    """Put the next tokens of texts with processors or sampling into their rows of `ids`."""
    texts = sorted(texts, key=lambda text: text[0].random is None)  # those that draw come first
    searches = [search for search, _ in texts]
    rows = to_device([row for _, row in texts], logits.device)
    scores = logits[rows].float()
    process(scores, [search.draft for search in searches], sorted(searches[0].vocabulary.end_ids))
    shares = [search.random.random() for search in searches if search.random is not None]
    num_drawn = len(shares)
    if num_drawn:
        options = [search.options for search in searches[:num_drawn]]
        ids[rows[:num_drawn]] = draw(scores[:num_drawn], options, shares)
    if num_drawn < len(texts):
        ids[rows[num_drawn:]] = scores[num_drawn:].argmax(dim=-1)


def _to_host(ids: Tensor, logprobs: Tensor) -> tuple[list[int], list[float]]:
    """A token of each row and its log-probability, in one copy."""
    own = logprobs.gather(1, ids[:, None])[:, 0]
    both = torch.stack([ids.double(), own.double()]).tolist()
    return [int(token_id) for token_id in both[0]], both[1]


def _advance_beams(
    logprobs: Tensor, beams: Sequence[BeamSearch], rows: Sequence[list[int]]
) -> list[list[int]]:
    """One step of G beam searches of equal width K."""
    row_of = to_device(rows, logprobs.device)
    vocabulary_size = logprobs.shape[-1]
    scores = logprobs[row_of]  # [G, K, V]
    if any(search.has_penalties or search.must_go_on for search in beams):
        drafts = [draft for search in beams for draft in search.drafts()]
        process(scores.view(-1, vocabulary_size), drafts, sorted(beams[0].vocabulary.end_ids))
    so_far = to_device([[b.score for b in search.beams] for search in beams], logprobs.device)
    totals, flat = scores.add_(so_far[..., None]).flatten(1).topk(beams[0].num_candidates)
    parents, token_ids = flat // vocabulary_size, flat % vocabulary_size
    own_logprobs = logprobs[row_of.gather(1, parents), token_ids]
    columns = torch.stack([parents.double(), token_ids.double(), totals.double(), own_logprobs.double()], 1)
    found = []
    for search, own in zip(beams, columns.tolist(), strict=True):
        candidates = [
            Candidate(int(parent), int(token_id), score, logprob)
            for parent, token_id, score, logprob in zip(*own, strict=True)
        ]
        found.append(search.advance(candidates))
    return found
