"""The bundled model: complete, small, and what its card says of it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import anymamba
from anymamba import assets
from anymamba.assets import bundled_model
from anymamba.errors import CheckpointError
from anymamba.training.settings import Settings, settings_from
from tests.support.processes import imported_by
from tests.support.tolerance import assert_same

# Written for this test in the manner of the training text, of which it is no part.
VERSE = """\
DUKE:
What news, good sir? The night is dark and cold,
And all my men are weary of the war.

MESSENGER:
My lord, the king is dead, and in his place
His brother sits, and will not hear thy name.
"""


@pytest.fixture(scope="module")
def model():
    return anymamba.MambaForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)


def test_it_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in bundled_model().iterdir()}
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(sizes.values()) <= 12e6


def test_finding_it_imports_nothing_slow():
    assert bundled_model().name == "shakespeare"
    loaded = imported_by("from anymamba.assets import bundled_model; bundled_model()")
    assert not {"torch", "transformers", "tokenizers", "numpy"} & loaded


def test_without_its_weights_it_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="bundled model is not installed"):
        bundled_model()


def test_the_card_has_the_figures_of_the_training():
    card = (bundled_model() / "README.md").read_text(encoding="utf-8")
    training = json.loads((bundled_model() / "training.json").read_text(encoding="utf-8"))
    result = training["result"]
    for name in ("validation_loss_windows", "validation_loss_stream"):
        assert f"{result[name]:.4f}" in card
    # nanoGPT's best on this text and split, with three times the weights: what was to be reached.
    assert result["validation_loss_windows"] < 1.4697
    assert f"seed | {training['settings']['seed']} " in card
    assert "nats per byte" in card
    best = min(point["validation_loss"] for point in training["curve"])
    assert f"step {result['best_step']:,} of {result['steps']:,}" in card
    # The best was found on every fourth window, of weights not yet rounded to bfloat16.
    assert best == pytest.approx(result["validation_loss_windows"], abs=0.03)


def test_it_was_trained_by_the_recipe():
    """Whoever runs the recipe trains this model, but for the number of threads."""
    recipe = Path(__file__).parents[2] / "examples" / "shakespeare" / "recipe.yaml"
    told = asdict(settings_from(recipe, data=["tinyshakespeare.txt"]))
    training = json.loads((bundled_model() / "training.json").read_text(encoding="utf-8"))
    # Settings that came later, as they are where nothing is said of them.
    later = {name: value for name, value in told.items() if name not in training["settings"]}
    assert later == {name: value for name, value in asdict(Settings()).items() if name in later}
    assert training["settings"] | later == told


def test_the_parameters_are_as_many_as_the_card_says(model):
    card = (bundled_model() / "README.md").read_text(encoding="utf-8")
    assert f"{model.num_parameters():,} parameters" in card
    assert 2e6 < model.num_parameters() < 5e6


def test_it_has_learned_the_manner_of_the_text(model):
    ids = torch.tensor([list(VERSE.encode())])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # A uniform guess costs log(256) = 5.5; the frequencies of letters alone bring it to about 3.
    assert loss < 2.3
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert model(shuffled, labels=shuffled).loss > loss + 1


def test_transformers_own_mamba_computes_the_same(model):
    other = transformers.MambaForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    ids = torch.tensor([list(VERSE.encode()[:64])])
    with torch.no_grad():
        ours, theirs = model(ids).logits, other(ids).logits
    assert_same(ours, theirs)


def load_plain():
    return Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))


def test_the_tokenizer_is_known_to_transformers():
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model())
    text = " A rose,  by any other name;\n\tété 花 🌹 . ,'s"
    tokens = tokenizer(text)["input_ids"]
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == tokenizer.vocab_size == 256
    # The byte that no text holds; trainers ask for an end and for padding.
    assert tokenizer.all_special_tokens == ["Ā"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


@given(st.text())
def test_a_token_is_a_byte(text):
    tokenizer = load_plain()
    tokens = tokenizer.encode(text).ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text


def test_every_byte_is_a_token():
    tokenizer = load_plain()
    assert tokenizer.get_vocab_size() == 256
    every = [tokenizer.decode([byte]) for byte in range(256)]
    assert every == [bytes([byte]).decode("utf-8", errors="replace") for byte in range(256)]
