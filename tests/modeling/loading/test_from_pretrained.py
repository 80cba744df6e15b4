"""`from_pretrained`: every keyword that Transformers documents works, or is refused by its name."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from anymamba import MambaConfig, MambaForCausalLM, MambaModel, MambaPreTrainedModel
from anymamba.checkpoint import open_checkpoint
from anymamba.errors import CheckpointError, HubError, InputError
from anymamba.modeling.loading.arguments import FILES, PASSED_ON, PLACE, REFUSED
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.weights.weights import load_weights
from tests.modeling.loading.test_loading import write_minimal, write_original
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

IDS = words(2, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small_model().save_pretrained(folder)
    return folder


def test_every_keyword_of_transformers_is_in_the_table() -> None:
    """Those of the signature, of the documentation, and those it takes out of its **kwargs."""
    function = PreTrainedModel.from_pretrained.__func__
    named = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    source = inspect.getsource(function)
    popped = set(re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", source))
    listed = re.search(r"for name in \[(.*?)\]", source)
    assert listed is not None
    popped |= set(re.findall(r'"(\w+)"', listed[1]))
    documented = set(re.findall(r"^ {12}(\w+) ?\(`", function.__doc__ or "", re.M))
    documented -= {"pretrained_model_name_or_path", "model_args"}
    known = {*FILES, *PASSED_ON, *PLACE, *REFUSED}
    assert len(named) > 8
    assert len(popped) > 25
    assert len(documented) > 20
    assert (named | popped | documented) - known == set()


# The values of a call that is to load the model as it is.
SAME: dict[str, Any] = {
    "dtype": torch.float32,
    "torch_dtype": "float32",
    "device_map": {"": "cpu"},
    "max_memory": {"cpu": "1GB"},
    "offload_buffers": False,
    "attn_implementation": "eager",
    "low_cpu_mem_usage": True,
    "use_safetensors": True,
    "weights_only": True,
    "ignore_mismatched_sizes": True,
    "trust_remote_code": False,
    "local_files_only": True,
    "force_download": False,
    "revision": "main",
    "token": None,
    "disable_mmap": True,
    "variant": None,
    "key_mapping": {"^nothing": "anything"},
    "tp_plan": None,
    "offload_state_dict": True,
}


@pytest.mark.parametrize("keyword", SAME)
@pytest.mark.filterwarnings("ignore")
def test_a_keyword_is_taken(saved: Path, keyword: str) -> None:
    loaded = MambaForCausalLM.from_pretrained(saved, **{keyword: SAME[keyword]})
    assert_same(loaded(IDS).logits, small_model()(IDS).logits)


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_a_keyword_without_meaning_is_refused_by_name(saved: Path, keyword: str) -> None:
    with pytest.raises(InputError, match=rf"^{keyword}: "):
        MambaForCausalLM.from_pretrained(saved, **{keyword: "auto"})


def test_a_misspelt_keyword_is_named(saved: Path) -> None:
    with pytest.raises(TypeError, match="dtpye"):
        MambaForCausalLM.from_pretrained(saved, dtpye="auto")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_auto_is_the_stored_type(tmp_path: Path, stored: torch.dtype, keyword: str) -> None:
    small_model().to(stored).save_pretrained(tmp_path)
    for cls in (MambaForCausalLM, MambaModel):
        assert cls.from_pretrained(tmp_path, **{keyword: "auto"}).dtype == stored


def test_a_part_of_the_model_on_disk(saved: Path, tmp_path: Path) -> None:
    places = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu"}
    places |= {"backbone.layers.0": "cpu", "backbone.layers.1": "disk"}
    loaded = MambaForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    assert next(loaded.backbone.layers[1].parameters()).is_meta
    assert_same(loaded(IDS, use_cache=False).logits, small_model()(IDS).logits)


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_a_variant(tmp_path: Path, shard: str) -> None:
    model = small_model()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, variant="fp16")
    assert_same(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MambaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="variant"):
        MambaForCausalLM.from_pretrained(tmp_path, variant="../x")


def test_safetensors_or_pickles(tmp_path: Path) -> None:
    model = small_model()
    write_original(tmp_path, model)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert_same(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors"):
        MambaForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(InputError, match="weights_only"):
        MambaForCausalLM.from_pretrained(tmp_path, weights_only=False)


def test_names_of_the_caller_s(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {f"net.{name}": tensor for name, tensor in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected 'net\."):
        MambaForCausalLM.from_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, key_mapping={r"^net\.": ""})
    assert_same(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")  # under its own names
    assert MambaForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.float32


def test_a_config_of_the_caller_s(saved: Path) -> None:
    theirs = transformers.MambaConfig(**json.loads((saved / "config.json").read_text()))
    for config in (MambaConfig.from_pretrained(saved), theirs, str(saved), saved / "config.json"):
        loaded = MambaForCausalLM.from_pretrained(saved, config=config)
        assert type(loaded.config) is MambaConfig
        assert_same(loaded(IDS).logits, small_model()(IDS).logits)


def test_a_state_dict_of_the_caller_s() -> None:
    model = small_model()
    weights = model.state_dict()
    loaded = MambaForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    assert_same(loaded(IDS).logits, model(IDS).logits)
    del weights["backbone.norm_f.weight"]
    with pytest.raises(CheckpointError, match=r"missing backbone\.norm_f\.weight"):
        MambaForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    with pytest.raises(InputError, match="state_dict"):
        MambaForCausalLM.from_pretrained("name", state_dict=weights)
    with pytest.raises(InputError, match="config="):
        MambaForCausalLM.from_pretrained(None)


def test_a_generation_config_of_the_caller_s(saved: Path, tmp_path: Path) -> None:
    given = transformers.GenerationConfig(max_new_tokens=3)
    loaded = MambaForCausalLM.from_pretrained(saved, generation_config=given)
    assert loaded.generation_config.max_new_tokens == 3
    # One that lies beside weights that Transformers does not read counts too.
    write_original(tmp_path, small_model())
    given.save_pretrained(tmp_path)
    assert MambaForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3


def test_what_was_loaded_is_told(saved: Path) -> None:
    model, info = MambaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, MambaForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_other_sizes(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="expected 70×24"):
        MambaForCausalLM.from_pretrained(saved, vocab_size=70)
    loaded = MambaForCausalLM.from_pretrained(saved, vocab_size=70, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (70, 24)
    assert torch.equal(loaded.backbone.layers[1].mixer.D, small_model().backbone.layers[1].mixer.D)


def test_the_place_on_the_hub(saved: Path, tmp_path: Path) -> None:
    place = {"cache_dir": tmp_path, "revision": "x", "token": "y", "local_files_only": True}
    with pytest.raises(HubError):
        MambaForCausalLM.from_pretrained("owner/name", **place)
    inner = MambaForCausalLM.from_pretrained(saved.parent, subfolder=saved.name)
    assert inner.name_or_path == str(saved.parent)


# GGUF files and adapters.


def test_a_folder_with_a_gguf_file_alone(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    convert(saved, folder / "model.gguf", "gguf", "f32")
    whole = MambaForCausalLM.from_pretrained(saved)
    for loaded in (
        MambaForCausalLM.from_pretrained(folder),
        MambaForCausalLM.from_pretrained(folder, gguf_file="model.gguf"),
    ):
        assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)
    assert MambaConfig.from_pretrained(folder).hidden_size == 24
    (folder / "other.gguf").write_bytes((folder / "model.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="several GGUF files"):
        MambaForCausalLM.from_pretrained(folder)


def test_a_gguf_file(saved: Path, tmp_path: Path) -> None:
    convert(saved, tmp_path / "model.gguf", "gguf", "f32")
    for loaded in (
        MambaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"),
        MambaForCausalLM.from_pretrained(tmp_path / "model.gguf"),
        MambaForCausalLM.from_pretrained(str(tmp_path / "model.gguf"), dtype="auto"),
    ):
        assert_same(loaded(IDS).logits, small_model()(IDS).logits)
        loaded.backbone.layers[0].mixer.D.data.add_(1)  # the file's memory cannot be written
    backbone = MambaModel.from_pretrained(tmp_path / "model.gguf")
    assert_same(backbone(IDS).last_hidden_state, small_model().backbone(IDS).last_hidden_state)
    assert MambaConfig.from_pretrained(tmp_path / "model.gguf").hidden_size == 24
    with pytest.raises(CheckpointError, match=r"gguf_file: .* has no file 'other\.gguf'"):
        MambaForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")


@pytest.mark.parametrize("write", [None, write_original])
@pytest.mark.parametrize("embedded", [False, True])
def test_a_folder_with_an_adapter(tmp_path: Path, write: Any, embedded: bool) -> None:
    base = tmp_path / "base"
    small_model().save_pretrained(base) if write is None else write(base, small_model())
    loaded = MambaForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(loaded, lora).eval()
    assert tuned.peft_config["default"].base_model_name_or_path == str(base)
    place = base if embedded else tmp_path / "adapter"
    tuned.save_pretrained(place)
    again = MambaForCausalLM.from_pretrained(place, adapter_name="mine")
    assert list(again.peft_config) == ["mine"]
    assert_same(again(IDS).logits, tuned(IDS).logits)


def test_an_adapter_that_names_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="does not say which model"):
        MambaForCausalLM.from_pretrained(tmp_path)


# Classes of a user's own.


class Classifier(MambaPreTrainedModel):
    """With a head and a buffer that no Mamba has."""

    def __init__(self, config: MambaConfig, classes: int = 3) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.classifier = nn.Linear(config.hidden_size, classes)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.post_init()


class Pair(MambaPreTrainedModel):
    """Two Mambas under names of their own."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.left, self.model = MambaModel(config), MambaModel(config)
        self.post_init()


class Scored(MambaForCausalLM):
    """A language model with a second head."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()


def randomized(model: nn.Module) -> Any:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 1)
    return model


@pytest.mark.parametrize("cls", [Classifier, Pair, Scored])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_own_class_saves_and_loads(tmp_path: Path, cls: Any, pickled: bool) -> None:
    model = randomized(cls(small_model().config))
    model.save_pretrained(tmp_path)
    if pickled:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    again = cls.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("write", [write_original, write_minimal])
def test_an_own_head_starts_anew_on_any_layout(tmp_path: Path, write: Any) -> None:
    model = small_model()
    write(tmp_path, model)
    for cls in (Classifier, Scored):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert torch.equal(loaded.backbone.norm_f.weight, model.backbone.norm_f.weight)
        assert torch.equal(loaded.backbone.embeddings.weight, model.backbone.embeddings.weight)
        assert all(
            name.startswith(("classifier", "score", "seen")) for name in info["missing_keys"]
        )
        assert not next(iter(loaded.children())).embeddings.weight.is_meta
    assert Classifier.from_pretrained(tmp_path, classes=5).classifier.out_features == 5


@pytest.mark.parametrize("cls", [Classifier, Scored])
def test_a_backbone_is_never_filled(tmp_path: Path, cls: Any) -> None:
    cls(small_model().config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.layers.1.mixer.D"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing backbone\.layers\.1\.mixer\.D"):
        cls.from_pretrained(tmp_path)


def test_a_classifier_s_backbone_is_taken_out(tmp_path: Path) -> None:
    model = randomized(Classifier(small_model().config))
    model.save_pretrained(tmp_path)
    for cls in (MambaModel, MambaForCausalLM):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        found = loaded.get_input_embeddings().weight
        assert torch.equal(found, model.backbone.embeddings.weight)
        assert "classifier.weight" in info["unexpected_keys"]


# Names on disk.


def named(model: MambaForCausalLM, kind: str) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of a layout, or in front of them a wrapper's prefix."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and kind != "Transformers with head":
        del weights["lm_head.weight"]
    if kind.startswith("Transformers"):
        return weights
    if kind in ("original", "minimal"):
        weights = {n.replace("embeddings.", "embedding."): t for n, t in weights.items()}
    if kind in ("minimal", "backbone"):
        return {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    prefix = {"Lightning": "model.", "compiled": "_orig_mod.", "parallel": "module."}
    return {prefix.get(kind, "") + name: tensor for name, tensor in weights.items()}


NAMINGS = [
    *("Transformers", "Transformers with head", "original", "minimal", "backbone"),
    *("Lightning", "compiled", "parallel"),
]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_reader_takes_every_name(tmp_path: Path, naming: str, tied: bool) -> None:
    """Beside Transformers' config: from_pretrained, load_state_dict, the runtime, convert."""
    model = small_model(tie_word_embeddings=tied)
    weights = named(model, naming)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    expected = model.state_dict()
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    fresh = small_model(seed=5, tie_word_embeddings=tied)
    fresh.load_state_dict(weights)
    for other in (loaded, fresh):
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    backbone = MambaModel.from_pretrained(tmp_path)
    assert torch.equal(backbone.embeddings.weight, expected["backbone.embeddings.weight"])
    runtime = load_weights(open_checkpoint(tmp_path)).tensors
    for name, array in runtime.items():
        assert (torch.from_numpy(array.copy()) == expected[name]).all(), name
    convert(tmp_path, tmp_path / "converted")
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


def test_load_state_dict_still_names_what_does_not_fit() -> None:
    model = small_model()
    weights = named(model, "original")
    del weights["backbone.norm_f.weight"]
    weights["backbone.extra"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"norm_f\.weight[\s\S]*backbone\.extra"):
        model.load_state_dict(weights)


def test_another_head_than_the_config_says_is_refused_by_both_faces(tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    for read in (
        lambda: MambaForCausalLM.from_pretrained(tmp_path),
        lambda: load_weights(open_checkpoint(tmp_path)),
        lambda: convert(tmp_path, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointError, match=r"ties lm_head\.weight"):
            read()
    both = MambaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(both.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", ["lm_head.weight", "backbone.layers.0.mixer.D"])
def test_whole_numbers_are_no_weights(tmp_path: Path, name: str, pickled: bool) -> None:
    small_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name] = weights[name].to(torch.int64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{name} .* floating-point"):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_two_names_of_one_activation(tmp_path: Path) -> None:
    small_model(hidden_act="swish").save_pretrained(tmp_path)
    assert_same(MambaForCausalLM.from_pretrained(tmp_path)(IDS).logits, small_model()(IDS).logits)
    convert(tmp_path, tmp_path / "model.gguf", "gguf", "f32")


def test_mambapy_is_not_needed_where_a_kernel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from anymamba.ops import backends

    monkeypatch.setitem(backends.INSTALLED, "mambapy", False)
    model = small_model(use_mambapy=True)
    assert_same(model(IDS).logits, small_model()(IDS).logits)
