"""From logits to tokens for all running texts at once.

Most texts take the largest logit: those are served by one maximum over the batch. Texts with processors
or sampling are served one by one, beam searches in groups of equal width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.beam import BeamSearch, Candidate
from blip2_actor.device import to_device
from blip2_actor.search import TextSearch

Searches = Sequence["tuple[TextSearch | BeamSearch, list[int]]"]
"""Searches with the rows of the logits that are theirs."""


def advance(logits: Tensor, searches: Searches) -> list[list[int] | None]:
    """Let every search take one step.

    Args:
        logits: [rows, V] in any dtype.

    Returns:
        For each search: None, or for each of its slots the index of the slot whose text it continues.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)
    greedy_ids, greedy_logprobs = _largest(logits, normalizer, searches)
    parents: list[list[int] | None] = [None] * len(searches)
    beams: dict[int, list[int]] = defaultdict(list)
    for index, (search, rows) in enumerate(searches):
        if isinstance(search, BeamSearch):
            beams[search.num_slots].append(index)
        elif search.takes_largest:
            search.accept(greedy_ids[rows[0]], greedy_logprobs[rows[0]])
        else:
            row = rows[0]
            token_id = search.choose(logits[row])
            search.accept(token_id, float(logits[row, token_id] - normalizer[row]))
    for indices in beams.values():
        group = [searches[i] for i in indices]
        for index, found in zip(indices, _advance_beams(logits, normalizer, group), strict=True):
            parents[index] = found
    return parents


def _largest(logits: Tensor, normalizer: Tensor, searches: Searches) -> tuple[list[int], list[float]]:
    """Id and log-probability of each row's largest logit, the end aside where a text must go on."""
    ids, logprobs = _to_host(logits, normalizer)
    early = [
        own[0]
        for search, own in searches
        if isinstance(search, TextSearch) and search.must_go_on and ids[own[0]] in search.vocabulary.end_ids
    ]
    if early:
        end_ids = next(search.vocabulary.end_ids for search, _ in searches)
        rows = to_device(early, logits.device)
        others = logits[rows].index_fill_(1, to_device(list(end_ids), logits.device), float("-inf"))
        for row, token_id, logprob in zip(early, *_to_host(others, normalizer[rows]), strict=True):
            ids[row], logprobs[row] = token_id, logprob
    return ids, logprobs


def _to_host(logits: Tensor, normalizer: Tensor) -> tuple[list[int], list[float]]:
    """The largest logit of each row: its id and log-probability, in one copy."""
    largest, ids = logits.max(dim=-1)
    both = torch.stack([ids.double(), (largest - normalizer).double()]).tolist()
    return [int(token_id) for token_id in both[0]], both[1]


def _advance_beams(logits: Tensor, normalizer: Tensor, group: Searches) -> list[list[int]]:
    """One step of G beam searches of equal width K."""
    beams = [search for search, _ in group if isinstance(search, BeamSearch)]
    rows = to_device([rows for _, rows in group], logits.device)
    vocabulary_size = logits.shape[-1]
    logprobs = logits[rows] - normalizer[rows][..., None]  # [G, K, V]
    raw = logprobs
    if any(b.has_penalties for b in beams):
        raw = logprobs.clone()
        for search, own in zip(beams, logprobs, strict=True):
            if search.has_penalties:
                search.process(own)
    early = [index for index, search in enumerate(beams) if search.must_go_on]
    if early:  # all at once: one by one, this takes a GPU's host longer than the step
        end_ids = to_device(sorted(beams[0].vocabulary.end_ids), logits.device)
        logprobs[to_device(early, logits.device)[:, None], :, end_ids] = float("-inf")
    so_far = to_device([[b.score for b in search.beams] for search in beams], logits.device)
    totals = (logprobs + so_far[..., None]).flatten(1)
    scores, flat = totals.topk(beams[0].num_candidates)
    own_logprobs = raw.flatten(1).gather(1, flat)
    found = []
    for search, *columns in zip(beams, scores.tolist(), flat.tolist(), own_logprobs.tolist(), strict=True):
        candidates = [
            Candidate(place // vocabulary_size, place % vocabulary_size, score, logprob)
            for score, place, logprob in zip(*columns, strict=True)
        ]
        found.append(search.advance(candidates))
    return found
