"""The drop-in's generation against loops over the model, and its sampling against counting."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.dropin.mamba_ssm.utils.generation import (
    InferenceParams,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    update_graph_cache,
)
from anymamba.errors import InputError
from tests.dropin.test_language_models import MODELS, small_model, words
from tests.support.stepping import Listener
from tests.support.tolerance import assert_layer


def likeliest(model: Any, ids: Tensor, length: int, penalty: float = 1.0) -> Tensor:
    """The whole sequence through the model for each new token; no cache."""
    with torch.no_grad():
        while ids.shape[1] < length:
            logits = model(ids).logits[:, -1]
            for row, seen in zip(logits, ids, strict=True):
                for token in set(seen.tolist()):
                    row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_a_loop(name: str) -> None:
    model = small_model(**MODELS[name])
    text = model.generate(words(2, 4), max_length=12)
    assert torch.equal(text, likeliest(model, words(2, 4), 12))


def test_the_penalty_counts_every_token_so_far() -> None:
    model = small_model()
    text = model.generate(words(2, 4), max_length=14, repetition_penalty=1.7)
    assert torch.equal(text, likeliest(model, words(2, 4), 14, penalty=1.7))
    assert not torch.equal(text, model.generate(words(2, 4), max_length=14))


def test_what_is_returned() -> None:
    model = small_model()
    assert model.generate(words(), 12, return_dict_in_generate=True).scores is None
    output = model.generate(words(), 12, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape == (2, 12)
    assert len(output.scores) == 3
    with torch.no_grad():
        whole = model(output.sequences).logits
    for step, scores in enumerate(output.scores):
        assert_layer(scores, whole[:, 8 + step])


def test_the_teacher_and_the_size_of_the_vocabulary() -> None:
    model, teacher = small_model(), words(2, 11)
    output = decode(teacher[:, :4], model, 13, teacher_outputs=teacher, output_scores=True)
    assert torch.equal(output.sequences[:, :11], teacher)
    narrow = decode(teacher, model, 30, vocab_size=5, output_scores=True)
    assert narrow.sequences[:, 11:].max() < 5
    assert narrow.scores[0].shape == (2, 5)


def test_when_it_ends() -> None:
    model = small_model()
    text = likeliest(model, words(1, 4), 20)[0, 4:].tolist()
    end = text[3]
    first = text.index(end)
    assert model.generate(words(1, 4), 20, eos_token_id=end).shape[1] == 4 + first + 1
    # As in the original, at least one token comes, and rows end together only.
    assert model.generate(words(2, 4), 2).shape == (2, 5)


def test_streaming_and_timing(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = Listener()
    text = small_model().generate(words(1, 4), 7, streamer=streamer, enable_timing=True)
    *pieces, end = streamer.heard
    assert torch.equal(torch.cat([torch.tensor(piece) for piece in pieces], dim=1), text)
    assert end == "end"
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")


def test_graphs_are_accepted_and_said_to_be_none() -> None:
    model = small_model(**MODELS["hybrid"])
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        text = model.generate(words(2, 4), 10, cg=True)
    assert torch.equal(text, model.generate(words(2, 4), 10))


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_cache_runs_steps(name: str) -> None:
    model, ids = small_model(**MODELS[name]), words(2, 8)
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        cache = update_graph_cache(model, None, 2, 5, 8)
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        assert update_graph_cache(model, cache, 2, 5, 8) is cache
    with torch.no_grad():
        whole = model(ids).logits
        for _ in range(2):
            cache.inference_params.reset(8, 2)
            model(ids[:, :5], inference_params=cache.inference_params)
            for t in (5, 6, 7):
                assert_layer(cache.run(ids[:, t : t + 1], None, t), whole[:, t : t + 1])


def test_a_cache_begins_anew() -> None:
    params = InferenceParams(8, 2, seqlen_offset=5, lengths_per_sample=torch.tensor([5, 5]))
    params.reset(9, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 3, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"got \(2, 0\)"):
        small_model().generate(words(2, 0), 5)


LOGITS = torch.tensor([[1.0, 4.0, 3.0, -2.0, 3.5], [0.0, -1.0, 2.0, 2.5, -3.0]])


def kept(logits: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def test_filters() -> None:
    logits = LOGITS.clone()
    modify_logits_for_top_k_filtering(logits, 2)
    assert kept(logits) == [{1, 4}, {2, 3}]
    assert torch.equal(logits[0, [1, 4]], LOGITS[0, [1, 4]])
    for top_p in (0.1, 0.5, 0.6, 0.8, 0.95, 0.999):
        logits = LOGITS.clone()
        modify_logits_for_top_p_filtering(logits, top_p)
        expected = []
        for row in LOGITS.tolist():
            total = sum(map(math.exp, row))
            chosen, mass = set(), 0.0
            for i in sorted(range(5), key=lambda i: -row[i]):
                if mass < top_p:
                    chosen.add(i)
                mass += math.exp(row[i]) / total
            expected.append(chosen)
        assert kept(logits) == expected
    for nothing in (0.0, 1.0):
        logits = LOGITS.clone()
        modify_logits_for_top_p_filtering(logits, nothing)
        modify_logits_for_min_p_filtering(logits, nothing)
        assert torch.equal(logits, LOGITS)
    modify_logits_for_min_p_filtering(logits, 0.9)
    assert kept(logits) == [{0, 1, 2, 4}, {2, 3}]


def test_the_penalty() -> None:
    logits = modify_logit_for_repetition_penalty(
        LOGITS.clone(), torch.tensor([[1, 3, 1], [0, 4, 4]]), 2.0
    )
    assert logits.tolist() == [[1.0, 2.0, 3.0, -4.0, 3.5], [0.0, -1.0, 2.0, 2.5, -6.0]]


def frequencies(row: int, **settings: Any) -> list[float]:
    torch.manual_seed(0)
    many = LOGITS[row].expand(20000, 5)
    drawn = sample(many, **settings)
    assert drawn.shape == (20000,)
    return (torch.bincount(drawn, minlength=5) / 20000).tolist()


def probabilities(row: int, chosen: set[int], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(LOGITS[row, i] / temperature) if i in chosen else 0.0 for i in range(5)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("settings", "chosen", "temperature"),
    [
        ({"top_k": 0}, {0, 1, 2, 3, 4}, 1.0),
        ({"top_k": 0, "temperature": 2.0}, {0, 1, 2, 3, 4}, 2.0),
        ({"top_k": 3}, {1, 2, 4}, 1.0),
        ({"top_k": 99, "temperature": 0.5}, {0, 1, 2, 3, 4}, 0.5),
        ({"top_k": 3, "top_p": 0.6}, {1, 4}, 1.0),
        ({"top_k": 0, "top_p": 0.6}, {1, 4}, 1.0),
        # The likeliest has e^4: the shares of the others are e^-3, e^-1, e^-6 and e^-0.5.
        ({"top_k": 0, "min_p": 0.3}, {1, 2, 4}, 1.0),
        ({"top_k": 0, "min_p": 0.5, "temperature": 3.0}, {1, 4}, 3.0),
    ],
)
def test_tokens_are_drawn_as_likely_as_they_are(
    settings: dict[str, Any], chosen: set[int], temperature: float
) -> None:
    # Of 20,000 draws a share strays by less than 0.015, four standard deviations.
    expected = probabilities(0, chosen, temperature)
    assert frequencies(0, **settings) == pytest.approx(expected, abs=0.015)


def test_rows_are_filtered_each_for_itself() -> None:
    assert sample(LOGITS).tolist() == [1, 3]
    drawn = torch.stack([sample(LOGITS, top_k=0, min_p=0.7) for _ in range(50)])
    assert drawn.unique().tolist() == [1, 3]
    before = LOGITS.clone()
    sample(before, top_k=3, top_p=0.5, temperature=2.0)
    sample(before, top_k=0, top_p=0.5)
    assert torch.equal(before, LOGITS)
    with pytest.raises(InputError, match=r"top_p is 1\.5"):
        sample(LOGITS, top_k=0, top_p=1.5)
