"""What a Transformers model can do beside computing: saving, resizing, tying, adapters, the hub.

And the table of it all, docs/transformers.md: each row names a test that is there.
"""

import ast
import re
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from anymamba import MambaForCausalLM, MambaModel
from anymamba.modeling.loading.arguments import FILES, PASSED_ON, PLACE, REFUSED
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

IDS = words(2, 9)
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "transformers.md"


def test_the_table_names_tests_that_are_there() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not re.match(r"\| (what|keyword|---)", line)]
    assert len(rows) > 60
    for row in rows:
        named = re.findall(r"`(\w+(?:/\w+)*\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"{file}::{test}: {row}"


def test_the_table_has_every_keyword_and_every_field() -> None:
    page = PAGE.read_text()
    fields = transformers.models.mamba.configuration_mamba.MambaConfig.__annotations__
    keywords = [name for name in (*FILES, *PASSED_ON, *PLACE, *REFUSED) if name[0] != "_"]
    for name in (*keywords, *(field for field in fields if field != "model_type")):
        assert f"`{name}`" in page, name


def test_every_public_method_is_transformers() -> None:
    """What a program may call on a model of theirs, it may call on one of ours."""
    theirs = transformers.models.mamba.modeling_mamba
    for ours, other in (
        (MambaForCausalLM, theirs.MambaForCausalLM),
        (MambaModel, theirs.MambaModel),
    ):
        assert issubclass(ours, PreTrainedModel)
        names = {name for name in dir(other) if not name.startswith("_")}
        assert names - set(dir(ours)) <= {"load_hook"}


@pytest.mark.parametrize("options", [{"max_shard_size": "10KB"}, {"variant": "x"}, {}])
def test_save_pretrained(tmp_path: Path, options: dict[str, str]) -> None:
    model = small_model()
    model.save_pretrained(tmp_path, **options)
    variant = {"variant": "x"} if "variant" in options else {}
    for cls in (MambaForCausalLM, transformers.MambaForCausalLM):
        assert_same(cls.from_pretrained(tmp_path, **variant)(IDS).logits, model(IDS).logits)


def test_save_pretrained_of_a_given_state_dict(tmp_path: Path) -> None:
    model = small_model()
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["backbone.norm_f.weight"], 2 * model.backbone.norm_f.weight)


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub: what would be sent is a folder that loads."""
    sent = {}

    class Stand(huggingface_hub.HfApi):
        def create_repo(self, repo_id: str, **_: object) -> object:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id: str, operations: list, **_: object) -> None:
            sent.update({entry.path_in_repo: entry for entry in operations})

    import transformers.utils.hub as hub

    for name in ("create_repo", "create_commit"):
        method = getattr(Stand(), name)
        if hasattr(hub, name):
            monkeypatch.setattr(hub, name, method)
        monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(Stand, name))
    small_model().push_to_hub("owner/name")
    assert {"config.json", "model.safetensors"} <= sent.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    before = model(IDS).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert_same(model(IDS).logits[..., :61], before)
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    model.resize_token_embeddings(64, pad_to_multiple_of=64)
    assert model(IDS).logits.shape[-1] == 64


def test_embeddings_are_got_and_set() -> None:
    model = small_model()
    table = torch.nn.Embedding(61, 24)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table is model.backbone.embeddings
    model.tie_weights()
    assert model.get_output_embeddings() is model.lm_head
    assert model.lm_head.weight is table.weight
    head = torch.nn.Linear(24, 61, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head


def test_gradient_checkpointing_is_switched() -> None:
    model = small_model().train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_adapters_of_the_model_s_own_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers asks for a newer PEFT than these methods need.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = small_model()
    before = model(IDS).logits
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["in_proj", "x_proj"], init_lora_weights=False)
    model.add_adapter(lora, adapter_name="one")
    with_one = model(IDS).logits
    assert not torch.equal(with_one, before)
    model.disable_adapters()
    assert_same(model(IDS).logits, before)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    other = small_model()
    other.load_adapter(str(tmp_path), adapter_name="two")
    assert other.active_adapters() == ["two"]
    assert_same(other(IDS).logits, with_one)
    other.delete_adapter("two")


def test_a_model_says_what_it_is() -> None:
    model = small_model()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.base_model is model.backbone
    assert model.can_generate()
    assert not MambaModel(model.config).can_generate()
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.get_memory_footprint() > 4 * model.num_parameters() - 1


def test_attention_is_refused_as_transformers_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"(?i)flash.attention.2"):
        MambaForCausalLM._from_config(small_model().config, attn_implementation="flash_attention_2")
