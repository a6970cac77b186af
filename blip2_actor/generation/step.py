"""Token selection: from the logits of one step to the next token of every running text.

Most texts take the largest logit. Texts with logits processors or sampling are handled together, before
anything is sent to the host. Beam searches advance in groups of equal num_beams and do_sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from math import inf, isnan

import torch
from torch import Tensor

from blip2_actor.generation.beam_search import BeamSearch, Candidate
from blip2_actor.generation.logits_processors import (
    WrongScores,
    has_processors,
    process_logits,
    run_processor,
)
from blip2_actor.generation.sampling import draw_without_replacement, sample, warp
from blip2_actor.generation.search import TextSearch
from blip2_actor.transfer import to_device

MAX_PROCESSED_AT_ONCE = 128
"""Maximum number of texts whose scores are processed at once: sorting takes several times their memory."""

NO_TOKEN = (
    "the largest score after logits processors must be above -inf, got -inf or NaN; let them leave a token"
)
"""Error of a text for which no token can be selected."""

TextRows = Sequence[tuple[TextSearch, int]]
"""Searches of one slot, each with its row of the logits."""


def advance(
    logits: Tensor, searches: Sequence[tuple[TextSearch | BeamSearch, list[int]]]
) -> list[list[int] | None]:
    """Advance every search by one token.

    Args:
        logits: [rows, V], in any dtype.
        searches: each with its rows of the logits, one per slot.

    Returns:
        For each search None, or, for a beam search, the index of the slot that each of its slots continues.
    """
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    texts: list[tuple[TextSearch, int]] = []
    beams: dict[tuple[int, bool], list[tuple[int, BeamSearch, list[int]]]] = defaultdict(list)
    for index, (search, rows) in enumerate(searches):
        if isinstance(search, BeamSearch):
            beams[search.num_slots, search.random is not None].append((index, search, rows))
        else:
            texts.append((search, rows[0]))
    if texts:
        _advance_texts(logits, logprobs, texts)
    parents: list[list[int] | None] = [None] * len(searches)
    for group in beams.values():
        indices, group_searches, group_rows = zip(*group, strict=True)
        group_parents = _advance_beams(logprobs, group_searches, group_rows)
        for index, search_parents in zip(indices, group_parents, strict=True):
            parents[index] = search_parents
    return parents


class LateTokens:
    """The largest logit of each row, on its way to the host, which does not wait for it.

    Args:
        logits: [rows, V], in any dtype.
        early: rows whose token is the largest among those that do not end a text.
        end_ids: tokens that end a text.
    """

    def __init__(self, logits: Tensor, early: Sequence[int] = (), end_ids: Collection[int] = ()) -> None:
        self.token_ids = logits.max(dim=-1).indices
        """int64[rows], on the device."""
        if early and end_ids:
            rows, others = _largest_but_ends(logits, early, end_ids)
            self.token_ids[rows] = others
        both = _with_own(self.token_ids, logits.log_softmax(dim=-1, dtype=torch.float32))
        self._event: torch.cuda.Event | None = None
        if both.device.type == "cuda":
            on_host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            both = on_host.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(logits.device))
        self._both = both

    def read(self) -> tuple[list[int], list[float]]:
        """Wait for the tokens; return them and their log-probabilities, of each row."""
        if self._event is not None:
            self._event.synchronize()
        return _as_lists(self._both)


def _advance_texts(logits: Tensor, logprobs: Tensor, texts: TextRows) -> None:
    next_ids = logits.max(dim=-1).indices
    processed = [text for text in texts if not text[0].takes_argmax]
    for start in range(0, len(processed), MAX_PROCESSED_AT_ONCE):
        _select_processed(logits, logprobs, next_ids, processed[start : start + MAX_PROCESSED_AT_ONCE])
    token_ids, token_logprobs = _to_host(next_ids, logprobs)
    _replace_early_ends(logits, logprobs, texts, token_ids, token_logprobs)
    for search, row in processed:
        if token_logprobs[row] == inf and search.error is None and not search.repeats:
            search.fail(NO_TOKEN)
    for search, row in texts:
        if search.error is None:
            search.accept(token_ids[row], token_logprobs[row])


def _select_processed(logits: Tensor, logprobs: Tensor, next_ids: Tensor, texts: TextRows) -> None:
    """Select the tokens of texts with logits processors or sampling; write them into rows of `next_ids`.

    The log-probability of a token becomes infinity if the processors have left none to select.
    """
    texts = sorted(texts, key=lambda text: text[0].random is None)  # sampling comes first
    searches = [search for search, _ in texts]
    rows = to_device([row for _, row in texts], logits.device)
    scores = logits[rows].float()
    sequences = [sequence for search in searches for sequence in search.sequences()]
    process_logits(scores, sequences, sorted(searches[0].vocabulary.end_ids))
    for row, search in enumerate(searches):
        if not search.repeats:  # a known token has had its call
            _run_own_processor(search, scores, slice(row, row + 1))
    uniforms = [search.random.random() for search in searches if search.random is not None]
    num_sampled = len(uniforms)
    if num_sampled:
        options = [search.options for search in searches[:num_sampled]]
        next_ids[rows[:num_sampled]] = sample(scores[:num_sampled], options, uniforms)
    if num_sampled < len(texts):
        next_ids[rows[num_sampled:]] = scores[num_sampled:].argmax(dim=-1)
    if any(search.processor is not None or has_processors(search.options) for search in searches):
        selected = next_ids[rows]
        is_possible = scores.gather(1, selected[:, None])[:, 0] > -inf  # nor is NaN
        logprobs[rows, selected] += torch.where(is_possible, 0.0, inf)  # that of NaN stays NaN


def _replace_early_ends(
    logits: Tensor, logprobs: Tensor, texts: TextRows, token_ids: list[int], token_logprobs: list[float]
) -> None:
    """Where a greedy text would end before min_new_tokens, take its largest logit among the other tokens.

    This is rare, so that most steps send no ban to the device.
    """
    end_ids = texts[0][0].vocabulary.end_ids
    early = [
        row
        for search, row in texts
        if token_ids[row] in end_ids and search.takes_argmax and search.end_is_banned
    ]
    if not early:
        return
    rows, others = _largest_but_ends(logits, early, end_ids)
    for row, token_id, logprob in zip(early, *_to_host(others, logprobs[rows]), strict=True):
        token_ids[row], token_logprobs[row] = token_id, logprob


def _largest_but_ends(logits: Tensor, rows: Sequence[int], end_ids: Collection[int]) -> tuple[Tensor, Tensor]:
    """Return rows, and the largest logit of each among tokens that do not end a text: int64[n] each."""
    on_device, ends = to_device(rows, logits.device), to_device(list(end_ids), logits.device)
    return on_device, logits[on_device].index_fill_(1, ends, float("-inf")).max(dim=-1).indices


def _to_host(token_ids: Tensor, logprobs: Tensor) -> tuple[list[int], list[float]]:
    """Copy a token of each row and its log-probability to the host, in one copy.

    int64[N] and float32[N, V].
    """
    return _as_lists(_with_own(token_ids, logprobs))


def _with_own(token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """Return a token of each row and its log-probability in one tensor, float64[2, N]."""
    own = logprobs.gather(1, token_ids[:, None])[:, 0]
    return torch.stack([token_ids.double(), own.double()])


def _as_lists(both: Tensor) -> tuple[list[int], list[float]]:
    token_ids, logprobs = both.tolist()
    return [int(token_id) for token_id in token_ids], logprobs


def _run_own_processor(search: TextSearch | BeamSearch, scores: Tensor, rows: slice | int) -> None:
    """Apply a request's own logits processor to its rows, in place; if that fails, this search alone does."""
    if search.processor is None or search.error is not None:
        return
    try:
        scores[rows] = run_processor(search.processor, search.sequences(), scores[rows].clone())
    except WrongScores as error:
        search.fail(str(error))
    except BaseException as error:  # the caller's code may raise anything
        search.fail(f"logits_processor must not raise, got {error!r}")


def _advance_beams(
    logprobs: Tensor, beams: Sequence[BeamSearch], rows: Sequence[list[int]]
) -> list[list[int]]:
    """Advance G beam searches with the same num_beams, K, and the same do_sample, by one token.

    Args:
        logprobs: float32[rows, V].
        beams: G searches.
        rows: K rows of the log-probabilities per search.

    Returns:
        For each search, the index of the beam that each new beam continues.
    """
    row_of = to_device(rows, logprobs.device)
    vocabulary_size = logprobs.shape[-1]
    so_far = to_device([[b.score for b in search.beams] for search in beams], logprobs.device)
    all_totals = _beam_scores(logprobs[row_of], beams).add_(so_far[..., None]).flatten(1)
    randoms = [search.random for search in beams if search.random is not None]
    if randoms:
        uniforms = [[random.random() for _ in range(beams[0].num_candidates)] for random in randoms]
        flat = draw_without_replacement(all_totals, uniforms)
        totals = all_totals.gather(1, flat)
    else:
        totals, flat = all_totals.topk(beams[0].num_candidates)
    parents, token_ids = flat // vocabulary_size, flat % vocabulary_size
    token_logprobs = logprobs[row_of.gather(1, parents), token_ids]
    columns = torch.stack([x.double() for x in (parents, token_ids, totals, token_logprobs)], 1)
    candidates = [
        [
            Candidate(int(parent), int(token_id), score, logprob)
            for parent, token_id, score, logprob in zip(*search_columns, strict=True)
        ]
        for search_columns in columns.tolist()
    ]
    for search, (best, *_) in zip(beams, candidates, strict=True):
        can_go_on = best.score > -inf or bool(search.finished) or search.error is not None
        if not can_go_on and not isnan(best.logprob):
            search.fail(NO_TOKEN)
    return [search.advance(c) for search, c in zip(beams, candidates, strict=True)]


def _beam_scores(scores: Tensor, beams: Sequence[BeamSearch]) -> Tensor:
    """Process the log-probabilities of the next tokens: float32[G, K, V] -> float32[G, K, V]."""
    flat = scores.view(-1, scores.shape[-1])
    end_ids = sorted(beams[0].vocabulary.end_ids)
    if any(search.has_processors or search.end_is_banned for search in beams):
        sequences = [sequence for search in beams for sequence in search.sequences()]
        process_logits(flat, sequences, end_ids)
    for index, search in enumerate(beams):
        _run_own_processor(search, scores, index)
    if beams[0].random is not None:
        options = [search.options for search in beams for _ in search.beams]
        scores = warp(flat, options, min_kept=beams[0].min_kept).view_as(scores)
    renormalized = [index for index, search in enumerate(beams) if search.options.renormalize_logits]
    if renormalized:
        indices = to_device(renormalized, scores.device)
        scores[indices] = scores[indices].log_softmax(dim=-1)
    return scores
