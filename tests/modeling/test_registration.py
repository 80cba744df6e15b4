"""`register` and `unregister`: what they change, for whom, and that nothing of it remains."""

import copy
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining
from transformers import MambaForCausalLM as TheirMamba
from transformers.models.mamba.configuration_mamba import MambaConfig as TheirConfig

import anymamba
from anymamba.modeling import (
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    register,
    registration,
    unregister,
)
from anymamba.modeling.adapters import untie_head
from anymamba.modeling.registration import CONFIG_MAPPING
from anymamba.runtime.convert.conversion import convert
from tests.modeling.loading.test_loading import write_minimal, write_original
from tests.support import processes
from tests.support.models import small_model

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
IDS = torch.tensor([[1, 5, 7, 2, 9], [3, 3, 8, 19, 0]])


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.fixture
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SIZES)).eval()


def adapted(model: torch.nn.Module, *targets: str, **settings: object) -> peft.PeftModel:
    """The model with an adapter whose every factor is random, so that it changes the outputs."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **settings)
    with warnings.catch_warnings():
        # PEFT says of tied embeddings what these tests are about.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


def same(found: Tensor, reference: Tensor, bound: float = 1e-5) -> bool:
    """Whether they differ by rounding alone.

    Merging computes (W + B A) x in the place of W x + B (A x): float32, two orders of the same
    products, so 1e-5 of the largest logit, as the design allows for one operator.
    """
    scale = max(1.0, float(reference.abs().max()))
    return torch.allclose(found, reference, rtol=0, atol=bound * scale)


def test_the_auto_classes_build_ours(tmp_path: Path, registered: None) -> None:
    config = transformers.models.mamba.MambaConfig(**SIZES)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MambaConfig
    assert type(AutoConfig.for_model("mamba")) is MambaConfig
    assert type(AutoModel.from_config(loaded)) is MambaModel
    for auto in (AutoModelForCausalLM, AutoModelForPreTraining):
        assert type(auto.from_config(loaded)) is MambaForCausalLM
    MambaForCausalLM(loaded).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MambaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is MambaModel


def test_a_config_is_read_by_keywords(tmp_path: Path, registered: None) -> None:
    small_model().save_pretrained(tmp_path)
    for reader in (transformers.PreTrainedConfig, MambaConfig):
        fields, left = reader.get_config_dict(pretrained_model_name_or_path=tmp_path, name="mine")
        assert fields["hidden_size"] == 24
        assert left == {"name": "mine"}


def test_transformers_own_config_builds_ours(registered: None) -> None:
    """A program may have made the config before."""
    theirs = TheirConfig(**SIZES, use_bias=True)
    for built in (AutoModelForCausalLM.from_config(theirs), AutoModel.from_config(theirs)):
        assert type(built).__module__.startswith("anymamba.")
        assert type(built.config) is MambaConfig
        assert built.config.use_bias is True


def test_other_models_and_classes_imported_before_are_not_touched(registered: None) -> None:
    theirs = TheirMamba(TheirConfig(**SIZES))
    assert {type(module).__module__.split(".")[0] for module in theirs.modules()} == {
        "torch",
        "transformers",
    }
    gpt2 = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=8)
    assert type(AutoModel.from_config(gpt2)) is transformers.GPT2Model


SUBPROCESS = """
import sys
import torch, transformers
import transformers.models.auto.configuration_auto as configs
import transformers.models.auto.modeling_auto as models
import transformers.models.auto.tokenization_auto as tokenizers
from peft.tuners import tuners_utils

def everything():
    mappings = {
        f"{module.__name__}.{name}": (id(value), dict(value._extra_content))
        for module in (configs, models, tokenizers)
        for name, value in vars(module).items()
        if hasattr(value, "_extra_content")
    }
    patched = {
        name: getattr(tuners_utils, name, None) or getattr(tuners_utils.BaseTuner, name)
        for name in ("_check_lora_target_modules_mamba", "merge_and_unload", "merge_adapter")
    }
    built = [
        transformers.AutoConfig.for_model("mamba").__class__,
        transformers.AutoModelForCausalLM._model_mapping[transformers.MambaConfig],
        transformers.AutoModel._model_mapping[transformers.MambaConfig],
        transformers.AutoTokenizer.__dict__.keys(),
    ]
    import peft.auto
    names = ("MambaConfig", "MambaModel", "MambaForCausalLM", "MambaPreTrainedModel")
    modules = ("transformers", "transformers.models.mamba",
               "transformers.models.mamba.modeling_mamba",
               "transformers.models.mamba.configuration_mamba")
    found = [
        (type(sys.modules[module]), getattr(sys.modules[module], name, None))
        for module in modules for name in names
    ]
    readers = [transformers.PreTrainedConfig.__dict__["get_config_dict"],
               peft.auto.get_default_import_allowlist]
    return mappings, patched, built, found, readers

before = everything()
assert before[2][0] is transformers.MambaConfig
import anymamba
assert everything() == before, "importing anymamba changed something"
anymamba.MambaForCausalLM
assert everything() == before, "importing anymamba.modeling changed something"
anymamba.unregister()
assert everything() == before
anymamba.register()
registered = everything()
assert registered != before
assert registered[2][0] is anymamba.MambaConfig
anymamba.register()
assert everything() == registered, "the second register changed something"
anymamba.unregister()
assert everything() == before, "unregister left something"
anymamba.unregister()
assert everything() == before
anymamba.register()
assert everything()[2] == registered[2]
print("done")
"""


@pytest.mark.slow
def test_unregister_leaves_nothing_behind() -> None:
    """In a process of its own, where nothing else was imported before the first look."""
    result = processes.python("-c", SUBPROCESS)
    assert result.stdout == "done\n", result.stderr


def test_somebody_else_s_registration_stays() -> None:
    class Other(transformers.PreTrainedConfig):
        model_type = "mamba"

    try:
        register()
        AutoConfig.register("mamba", Other, exist_ok=True)
        unregister()
        assert type(AutoConfig.for_model("mamba")) is Other
        register()
        assert type(AutoConfig.for_model("mamba")) is MambaConfig
        unregister()
        assert type(AutoConfig.for_model("mamba")) is Other
    finally:
        unregister()
        del CONFIG_MAPPING._extra_content["mamba"]


def test_register_works_where_peft_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners", None)
    register()
    assert type(AutoConfig.for_model("mamba")) is MambaConfig
    unregister()


def test_the_package_offers_both() -> None:
    assert anymamba.register is register
    assert anymamba.unregister is unregister


# Classes that are found by their names.


@pytest.mark.parametrize("name", sorted(registration._NAMED_IN))
def test_a_class_is_found_by_its_name(name: str) -> None:
    module = importlib.import_module(name)
    before = {cls: getattr(module, cls) for cls in registration._NAMED_IN[name]}
    register()
    try:
        for cls, theirs in before.items():
            found = getattr(module, cls)
            assert found is getattr(anymamba, cls)
            assert found is not theirs
    finally:
        unregister()
    assert {cls: getattr(module, cls) for cls in before} == before
    assert type(module).__name__ in ("module", "ModuleType", "_LazyModule")


def test_whoever_puts_a_class_over_ours_keeps_it() -> None:
    theirs = transformers.MambaModel
    try:
        register()
        transformers.MambaModel = TheirMamba
        assert transformers.MambaModel is TheirMamba
        unregister()
        assert transformers.MambaModel is TheirMamba
    finally:
        unregister()
        transformers.MambaModel = theirs


@pytest.mark.parametrize("saved_by", ["ours", "theirs"])
def test_auto_peft_model_builds_ours(tmp_path: Path, saved_by: str) -> None:
    """Without a task type, PEFT imports the class that the adapter names."""
    register()
    try:
        base = MambaForCausalLM(MambaConfig(**SIZES))
        base.save_pretrained(tmp_path / "base")
        tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["x_proj"]))
        tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        if saved_by == "theirs":
            settings = json.loads(file.read_text())
            settings["auto_mapping"]["parent_library"] = TheirMamba.__module__
            file.write_text(json.dumps(settings))
        loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is MambaForCausalLM
        file.write_text(file.read_text().replace('"task_type": null', '"task_type": "CAUSAL_LM"'))
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is MambaForCausalLM
        direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert type(direct) is MambaForCausalLM
        assert list(direct.peft_config) == ["default"]
    finally:
        unregister()


@pytest.mark.parametrize("write", [write_original, write_minimal])
def test_the_auto_classes_read_other_layouts(
    tmp_path: Path, registered: None, write: object
) -> None:
    model = small_model()
    write(tmp_path, model)  # type: ignore[operator]
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.architectures) == (24, ["MambaForCausalLM"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert type(AutoModel.from_pretrained(tmp_path)) is MambaModel
    alone = tmp_path / "alone"  # no other weights beside it, which could be read in its place
    alone.mkdir()
    convert(tmp_path, alone / "model.gguf", "gguf", "f32")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(alone, gguf_file="model.gguf"),
        AutoModelForCausalLM.from_pretrained(alone),
    ):
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# PEFT's guard.


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
def test_peft_s_guard_is_lifted_for_ours_alone(
    registered: None, model: MambaForCausalLM, target: str
) -> None:
    # PEFT asks of an adapter of a depthwise convolution that its rank divides by the groups.
    rank = {"r": 32} if target == "conv1d" else {}
    config = peft.LoraConfig(target_modules=[target], **rank)
    theirs = TheirMamba(TheirConfig(**SIZES))
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(theirs, config)
    peft.get_peft_model(copy.deepcopy(model), config)
    unregister()
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"])
def test_an_adapter_of_any_projection_counts(
    registered: None, model: MambaForCausalLM, target: str
) -> None:
    """What PEFT's guard is there for: that no adapter is bypassed, in the forward or backward."""
    before = logits(model)
    rank = 32 if target == "conv1d" else 4
    # A strong adapter: what it does to the step size must show in the logits.
    config = peft.LoraConfig(
        r=rank, lora_alpha=16 * rank, target_modules=[target], init_lora_weights=False
    )
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, config)
    tuned(IDS, labels=IDS).loss.backward()
    factors = [p for name, p in tuned.named_parameters() if "lora_" in name]
    assert len(factors) == 2 * SIZES["num_hidden_layers"]
    assert all(factor.grad.abs().sum() > 0 for factor in factors)
    unmerged = logits(tuned.eval())
    assert not same(unmerged, before)
    # Conv1d adapters of PEFT do not merge for every rank; projections do.
    if target != "conv1d":
        assert same(logits(tuned.merge_and_unload()), unmerged)


# Merging adapters of tied embeddings.


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["embeddings", "out_proj"], {}),
        (["lm_head"], {}),
        (["embeddings", "lm_head"], {}),
        (["embeddings", "lm_head"], {"ensure_weight_tying": True}),
    ],
    ids=["the embeddings", "the head", "both apart", "both as one"],
)
def test_merging_an_adapter_of_tied_weights_changes_no_logit(
    tmp_path: Path,
    registered: None,
    model: MambaForCausalLM,
    targets: list[str],
    settings: dict[str, bool],
) -> None:
    tuned = adapted(model, *targets, **settings)
    unmerged = logits(tuned)
    merged = tuned.merge_and_unload()
    assert same(logits(merged), unmerged)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    for loaded in (
        MambaForCausalLM.from_pretrained(tmp_path),
        TheirMamba.from_pretrained(tmp_path),
    ):
        assert loaded.config.tie_word_embeddings is False
        assert loaded.lm_head.weight is not loaded.backbone.embeddings.weight
        # The design's bound for whole models: Transformers' own adds up in another order.
        assert same(logits(loaded.eval()), unmerged, 1e-4)


def test_without_register_it_does(model: MambaForCausalLM) -> None:
    """The control: PEFT alone changes the head, so the tests above do test something."""
    tuned = adapted(model, "embeddings")
    unmerged = logits(tuned)
    merged = tuned.merge_and_unload()
    assert not same(logits(merged), unmerged, 1e-2)


def test_merge_adapter_and_back(registered: None, model: MambaForCausalLM) -> None:
    base = logits(model)
    tuned = adapted(model, "embeddings", "in_proj")
    unmerged = logits(tuned)
    tuned.merge_adapter()
    assert same(logits(tuned), unmerged)
    tuned.unmerge_adapter()
    assert same(logits(tuned), unmerged)
    assert same(logits(tuned.unload()), base)


def test_mixed_adapters_merge_too(registered: None, model: MambaForCausalLM) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["embeddings"], init_lora_weights=False)
    tuned = peft.PeftMixedModel(model, config).eval()
    unmerged = logits(tuned)
    assert same(logits(tuned.merge_and_unload()), unmerged)


def test_embeddings_trained_in_full_merge_too(
    tmp_path: Path, registered: None, model: MambaForCausalLM
) -> None:
    tuned = adapted(model, "in_proj", modules_to_save=["embeddings"])
    with torch.no_grad():
        tuned.base_model.model.backbone.embeddings.weight.add_(0.1)
    unmerged = logits(tuned)
    merged = tuned.merge_and_unload()
    assert same(logits(merged), unmerged)
    merged.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert same(logits(loaded), unmerged)


def test_tokens_trained_in_both_keep_the_head_tied(
    registered: None, model: MambaForCausalLM
) -> None:
    tuned = adapted(model, "in_proj", trainable_token_indices=[1, 5])
    table = tuned.get_base_model().backbone.embeddings
    with torch.no_grad():
        table.token_adapter.trainable_tokens_delta["default"].add_(0.1)
    unmerged = logits(tuned)
    merged = tuned.merge_and_unload()
    assert same(logits(merged), unmerged)
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.backbone.embeddings.weight


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_tied_head_stays_tied_where_no_adapter_touches_it(
    registered: None, model: MambaForCausalLM, merge: str
) -> None:
    tuned = adapted(model, "in_proj")
    getattr(tuned, merge)()
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_unloading_without_merging_keeps_the_head_tied(
    registered: None, model: MambaForCausalLM
) -> None:
    base = logits(model)
    unloaded = adapted(model, "embeddings").unload()
    assert unloaded.lm_head.weight is unloaded.backbone.embeddings.weight
    assert torch.equal(logits(unloaded), base)


def test_other_models_merge_as_before(registered: None) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)
    merged = adapted(transformers.GPT2LMHeadModel(config), "wte").merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is True


def test_an_untied_head_is_a_copy_that_is_saved(tmp_path: Path, model: MambaForCausalLM) -> None:
    base = logits(model)
    untie_head(model)
    head = model.lm_head.weight
    assert head.requires_grad
    assert head.data_ptr() != model.backbone.embeddings.weight.data_ptr()
    untie_head(model)
    assert model.lm_head.weight is head
    model.tie_weights()  # what resizing and loading call: they must not tie it again
    model.tie_weights(recompute_mapping=False)
    assert model.lm_head.weight is head
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        head.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(MambaForCausalLM.from_pretrained(tmp_path).lm_head.weight, head)


def test_the_guard_s_name_is_still_peft_s() -> None:
    """If PEFT renames what is patched, `register` would silently lift nothing."""
    assert callable(tuners_utils._check_lora_target_modules_mamba)
    assert callable(tuners_utils.BaseTuner.merge_adapter)
    assert callable(tuners_utils.BaseTuner.merge_and_unload)
