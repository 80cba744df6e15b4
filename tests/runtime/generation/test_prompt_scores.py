"""Log-probabilities of prompts that a batch reads, beside the logits of each beginning alone."""

import numpy as np
import pytest

import anymamba
from anymamba.runtime.generation import PromptScores

PROMPTS = ("Once upon a time there was a king. ", "To be, or not")


@pytest.fixture(scope="module")
def engine():
    return anymamba.load()


def expected_of(engine, ids):
    """In float64, by the definition, of all tokens but the first."""
    logits_lv = engine.logits(ids)[:-1].astype(np.float64)
    logprobs_lv = logits_lv - np.log(np.exp(logits_lv).sum(axis=1, keepdims=True))
    order_lv = np.argsort(-logits_lv, axis=1, kind="stable")
    return logprobs_lv, order_lv


@pytest.mark.parametrize("chunk_tokens", [5, 512])
def test_scores_beside_other_texts(engine, chunk_tokens):
    batch = engine.batch(rows=3, chunk_tokens=chunk_tokens)
    ids = [engine.prompt_ids(text) for text in PROMPTS]
    scores = [PromptScores(3), PromptScores(0)]
    sampling = anymamba.Sampling(max_new_tokens=4)
    batch.add(2, ids[0], engine.token_generator(ids[0], sampling), (7,), scores[0])
    batch.add(0, ids[1], None, (), scores[1])
    batch.add(1, ids[1], engine.token_generator(ids[1], sampling))
    written = {row: [] for row in range(3)}
    while batch.rows:
        for row, piece in batch.step():
            written[row] += [] if piece is None else piece.ids
    for row, prompt in ((2, PROMPTS[0]), (1, PROMPTS[1])):
        assert written[row] == engine.generate(prompt, sampling=sampling).ids
    for found, ids_l in zip(scores, ids, strict=True):
        logprobs_lv, order_lv = expected_of(engine, ids_l.tolist())
        chosen = logprobs_lv[np.arange(ids_l.size - 1), ids_l[1:]]
        assert found.logprobs[0] is None
        # Sums of 256 float32 numbers, and logits of about 20.
        np.testing.assert_allclose(found.logprobs[1:], chosen, atol=1e-4)
        count = 3 if found is scores[0] else 0
        assert [[id for id, _ in top] for top in found.top[1:]] == order_lv[:, :count].tolist()


def test_a_state_says_how_likely_the_first_token_is(engine):
    state = engine.prefill(engine.state(), PROMPTS[0])
    batch, scores = engine.batch(rows=2), PromptScores(1)
    ids = engine.prompt_ids(PROMPTS[1], state)
    given = state.batch_of(engine.identity)
    for name in ("conv", "ssm"):
        getattr(batch.blocks, name)[:, 1] = getattr(given, name)[:, 0]
    batch.blocks.counts[1], batch.blocks.logits[1] = given.counts[0], given.logits[0]
    batch.add(1, ids, None, (), scores)
    while batch.rows:
        batch.step()
    np.testing.assert_allclose(
        scores.logprobs, engine.score(PROMPTS[1], state=state).logprobs, atol=1e-4
    )
