"""LoRA adapters merged as checkpoints are read: peft's own merge is the reference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4Model

from glm4export.sources.checkpoint import Checkpoint, Location
from glm4export.sources.config_json import read_config
from glm4export.sources.lora import Adapter, merged, recorded, source_of
from glm4export.sources.tied import as_stored
from glm4export.weights.tensors import whole
from glm4runtime.contract import UserError
from tests.helpers import adapters, checkpoints
from tests.helpers.encoders import random_encoder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # peft's, of its own options

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
# Half precision: a last bit of the float32 sum may tip the rounding, by one step, once in thousands of numbers.
STEPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def open_adapters(*given: tuple[Path, float]) -> list[Adapter]:
    return [Adapter.open(Location(folder, {}), scale) for folder, scale in given]


def assert_as_peft(model: Any, folder: Path, given: list[tuple[Path, float]], prefix: str = "") -> set[str]:
    """Every tensor, whole and by a window of rows and columns; returns the names of those that were changed."""
    base = Checkpoint.open(folder)
    ours = merged(base, open_adapters(*given), tied=model.config.tie_word_embeddings)
    changed = set()
    for name, wanted in adapters.merge(model, given).state_dict().items():
        name = prefix + name
        found = ours.read(name, whole(ours.tensors[name].shape))
        assert found.dtype == wanted.dtype == base.tensors[name].dtype
        apart = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)
        if found.dtype != torch.float32:
            apart = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1e-4)
            assert (apart > 0).double().mean() <= 2e-3
        assert apart.max() <= STEPS[found.dtype], name
        window = tuple((size // 3, size - size // 4) for size in found.shape)
        part = ours.read(name, window).double()
        apart = (part - found[tuple(slice(*pair) for pair in window)].double()).abs()
        assert (apart <= STEPS[found.dtype] * part.abs().clamp(min=1)).all()
        if not torch.equal(found, base.read(name, whole(found.shape))):
            changed.add(name)
    return changed


def random_config(choice: random.Random, biased: bool) -> dict[str, Any]:
    """A LoraConfig of one of the kinds that people train."""
    names = choice.sample(LINEARS, choice.randint(1, 6))
    config: dict[str, Any] = {
        "r": choice.randint(1, 9),
        "lora_alpha": choice.choice((1, 8, 16, 2.5)),
        "use_rslora": choice.random() < 0.3,
        "task_type": choice.choice((None, "CAUSAL_LM")),
        "fan_in_fan_out": choice.random() < 0.2,
        "init_lora_weights": choice.choice((True, False, "gaussian")),
    }
    outer = choice.sample(("embed_tokens", "lm_head"), choice.choice((0, 0, 1, 2)))
    kind = choice.choice(("names", "names", "paths", "regex", "all-linear"))
    if kind == "all-linear":
        config["target_modules"] = "all-linear"
        names, outer = list(LINEARS), []
    elif kind == "regex":
        config["target_modules"] = rf".*layers\.\d+\..*({'|'.join(names)})"
        outer = []
    elif kind == "paths":
        config["target_modules"] = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "o_proj")]
        names, outer = ["q_proj", "o_proj"], []
    else:
        config["target_modules"] = names + outer
    if choice.random() < 0.4:
        config["rank_pattern"] = {names[0]: 3, rf"model\.layers\.0\..*{names[-1]}": 5}
        config["alpha_pattern"] = {f"layers.1.mlp.{names[0]}": 4, names[-1]: 6}
    if kind == "names" and choice.random() < 0.3:
        config["layers_to_transform"] = choice.choice((1, [0], [0, 1]))
        config["layers_pattern"] = choice.choice((None, "layers", ["layers"]))
        config["target_modules"] = names
        outer = []
    elif kind != "paths" and choice.random() < 0.3 and len(names) > 1:
        config["exclude_modules"] = choice.choice(([names[0]], rf".*\.0\..*{names[0]}"))
    config["use_dora"] = choice.random() < 0.3
    config["bias"] = choice.choice(("none", "none", "all", "lora_only"))
    if biased and set(names) <= {"q_proj", "k_proj", "v_proj"} and not config["use_dora"] and not outer:
        config["lora_bias"], config["init_lora_weights"] = True, True
    if choice.random() < 0.3:
        free = [name for name in ("lm_head", "embed_tokens", "norm", "input_layernorm") if name not in outer]
        config["modules_to_save"] = choice.sample(free, choice.randint(1, len(free)))
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_one_adapter_of_any_kind(biased: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = checkpoints.random_model(attention_bias=biased).to(dtype)
    folder = checkpoints.save(model, tmp_path / "base")
    for seed in range(8):
        config = random_config(random.Random(f"{seed} {dtype} {biased}"), biased)
        stored = torch.bfloat16 if seed % 3 == 0 else None
        adapter = adapters.train(model, tmp_path / f"adapter{seed}", seed, stored, **config)
        assert assert_as_peft(model, folder, [(adapter, 1.0)]), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_with_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    """On the same modules and on others, one after another, as peft rounds them."""
    model = checkpoints.random_model().to(dtype)
    folder = checkpoints.save(model, tmp_path / "base")
    made = [
        adapters.train(model, tmp_path / str(seed), seed, r=2 + seed, target_modules=targets)
        for seed, targets in enumerate((["q_proj", "embed_tokens"], ["q_proj", "down_proj"], "all-linear"))
    ]
    changed = assert_as_peft(model, folder, list(zip(made, (0.5, -1.0, 2.0), strict=True)))
    assert {name.rsplit(".", 2)[-2] for name in changed} == {*LINEARS, "embed_tokens"} and len(changed) == 13
    one = merged(Checkpoint.open(folder), open_adapters((made[0], 0.5)), tied=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        one.read(name, whole((128, 64))),
        merged(one, open_adapters((made[1], 1.0)), tied=False).read(name, whole((128, 64))),
    )


@pytest.mark.parametrize(
    ("task", "peft_task"), [("sequence-classification", "SEQ_CLS"), ("token-classification", "TOKEN_CLS")]
)
def test_an_adapter_of_a_classifier(task: str, peft_task: str, tmp_path: Path) -> None:
    """peft saves the head whole without being asked to."""
    model = random_encoder(task)
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=3, target_modules=["q_proj"], task_type=peft_task)
    heads = {name for name, _ in model.named_parameters() if name.startswith("score.")}
    assert heads <= assert_as_peft(model, folder, [(adapter, 1.0)])


def test_an_adapter_of_the_backbone_alone(tmp_path: Path) -> None:
    """Its names lack the causal model's `model.`."""
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "base")
    backbone = Glm4Model.from_pretrained(folder)
    for number, targets in enumerate((["embed_tokens", "q_proj"], "all-linear", r"layers\.1\..*down_proj")):
        adapter = adapters.train(
            backbone, tmp_path / str(number), r=3, target_modules=targets, modules_to_save=["norm"]
        )
        assert all(".model.model." not in name for name in load_file(adapter / adapters.WEIGHTS))
        assert assert_as_peft(backbone, folder, [(adapter, 1.0)], prefix="model.")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_a_tied_head(config: dict[str, Any], tmp_path: Path) -> None:
    """The model is what the adapter was trained in. (peft's merge adds to the shared tensor, and so to both ends.)"""
    model = checkpoints.random_model(tie_word_embeddings=True)
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=3, **config)
    ours = merged(Checkpoint.open(folder), open_adapters((adapter, 1.0)), tied=True)
    untied = "embed_tokens" in str(config) or "lm_head" in str(config)
    assert as_stored(read_config(folder / "config.json"), ours).tie_word_embeddings is not untied
    tensors = {name: ours.read(name, whole(stored.shape)) for name, stored in ours.tensors.items()}
    copy = checkpoints.random_model(tie_word_embeddings=not untied)
    missing, unexpected = copy.load_state_dict(tensors, strict=False)
    assert missing == ([] if untied else ["lm_head.weight"]) and not unexpected
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted, found = adapters.apply(model, [(adapter, 1.0)])(tokens).logits, copy(tokens).logits
    assert (wanted - found).abs().max() <= 2e-5


def test_an_embedding_that_is_saved_beside_its_matrices(tmp_path: Path) -> None:
    """peft loads it. It is the base's own mostly, and then no reason to refuse a scale."""
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=3, target_modules=["embed_tokens", "q_proj"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(adapter / adapters.WEIGHTS)
    assert name in tensors
    assert_as_peft(model, folder, [(adapter, 0.5)])
    save_file({**tensors, name: tensors[name] + 1}, adapter / adapters.WEIGHTS)
    assert_as_peft(model, folder, [(adapter, 1.0)])
    with pytest.raises(UserError, match=r"a scale of 0\.5 has no meaning for model\.embed_tokens\.weight, which the"):
        merged(Checkpoint.open(folder), open_adapters((adapter, 0.5)), tied=False)


def test_a_tied_embedding_that_is_saved_whole_is_the_head_too(tmp_path: Path) -> None:
    """As save_embedding_layers=True leaves it: peft loads it into the one tensor."""
    model = checkpoints.random_model(tie_word_embeddings=True)
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=3, target_modules=["q_proj"])
    embedding = model.get_input_embeddings().weight.detach() * 1.5
    tensors = load_file(adapter / adapters.WEIGHTS)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": embedding}, adapter / adapters.WEIGHTS)
    theirs = adapters.merge(model, [(adapter, 1.0)]).state_dict()
    ours = merged(Checkpoint.open(folder), open_adapters((adapter, 1.0)), tied=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(theirs[name], embedding) and torch.equal(ours.read(name, whole((96, 64))), embedding)
    assert as_stored(read_config(folder / "config.json"), ours).tie_word_embeddings


def test_what_a_manifest_keeps_of_adapters(tmp_path: Path) -> None:
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "base")
    adapter = adapters.train(model, tmp_path / "adapter", r=3, target_modules=["q_proj"])
    (opened,) = open_adapters((adapter, 0.5))
    facts = source_of([opened])
    assert set(facts) == {"lora.1.weights_sha256", "lora.1.config_sha256", "lora.1.scale"}
    assert facts["lora.1.scale"] == "0.5" and str(tmp_path) not in json.dumps(facts)
    base = Checkpoint.open(folder)
    assert merged(base, [opened], tied=False).fingerprint() == base.fingerprint()
    assert merged(base, [], tied=False) is base


def test_a_bundle_tells_its_adapters_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched by commit, in their order, ten and more; a manifest that lies is told."""
    model = checkpoints.random_model()
    folders = [adapters.train(model, tmp_path / str(n), n, r=1, target_modules=["q_proj"]) for n in range(2)]

    def download(repo_id: str, revision: str, **options: Any) -> str:
        assert revision == "commit"
        return str(folders[int(repo_id[-1])])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    places = [Location(folders[n % 2], {"repo_id": f"org/name{n % 2}", "commit": "commit"}) for n in range(12)]
    source = source_of([Adapter.open(place, 1.0 + n) for n, place in enumerate(places)])
    found = recorded({"fingerprint": "x", **source}, [])
    assert [(adapter.folder, adapter.scale) for adapter in found] == [(folders[n % 2], 1.0 + n) for n in range(12)]
    with pytest.raises(UserError, match=r"weights_sha256 is \w+; the bundle was built with 12 .* of 0 in this place"):
        recorded({**source, "lora.3.weights_sha256": "0"}, [])
    with pytest.raises(UserError, match="'twice' is not a scale"):
        recorded({**source, "lora.3.scale": "twice"}, [])
    with pytest.raises(UserError, match=r"from a local folder; name each with --lora"):
        recorded({"lora.2.scale": "1.0"}, [])
