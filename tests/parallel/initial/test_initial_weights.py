"""First weights from files or at random: what they are, and what is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel

import heteromesh as hm
from heteromesh.errors import UserError
from heteromesh.parallel.initial.weights import InitialWeights
from llama import Llama
from steps import TINY

CPU = torch.device("cpu")


def empty() -> Llama:
    with accelerate.init_empty_weights():
        return Llama(TINY)


def filled(model: nn.Module, files: Path | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    InitialWeights(model, files, seed).fill(CPU)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_ranges_are_those_of_the_whole_whatever_the_order(tmp_path: Path) -> None:
    save_file({k: t.bfloat16() for k, t in Llama(TINY).state_dict().items()}, tmp_path / "model.safetensors")
    for files in (None, tmp_path, tmp_path / "model.safetensors"):
        whole, model = filled(empty(), files), empty()
        parts = InitialWeights(model, files, 0)
        parts.check()
        for name, parameter in reversed(list(model.named_parameters())):
            size = parameter.numel()
            for start, stop in ((0, 1), (size // 3, size // 3 + 1), (1, size - 1), (size // 2, size)):
                read = parts.read(parameter, start, stop)
                assert torch.equal(read.float(), whole[name].reshape(-1)[start:stop]), (name, start)
    assert not torch.equal(filled(empty(), None, 1)["head.weight"], filled(empty())["head.weight"])


def gpt2() -> PreTrainedModel:
    config = GPT2Config(n_layer=8, n_embd=64, n_head=2, vocab_size=50, n_positions=32, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config)


def test_initialisation_is_transformers_own() -> None:
    """GPT-2's projections are initialised by the module above them, and smaller than other weights."""
    with accelerate.init_empty_weights():
        model = gpt2()
    model.tie_weights()
    spread = {name: float(p.std()) for name, p in filled(model).items()}
    assert spread["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.2, rel=0.1)
    assert spread["transformer.h.3.attn.c_proj.weight"] == pytest.approx(0.05, rel=0.1)
    assert spread["transformer.h.3.ln_1.weight"] == spread["transformer.h.3.mlp.c_fc.bias"] == 0.0


def test_files_of_the_base_model_and_adapters_of_peft(tmp_path: Path) -> None:
    real = gpt2()
    real.transformer.save_pretrained(tmp_path)  # without the prefix "transformer."
    with accelerate.init_empty_weights():
        model = gpt2()
    model.tie_weights()
    found = filled(get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)), tmp_path)
    where = "base_model.model.transformer.h.2.attn.c_attn"
    assert torch.equal(found[f"{where}.base_layer.weight"], real.transformer.h[2].attn.c_attn.weight)
    assert found[f"{where}.lora_A.default.weight"].std() > 0
    assert not found[f"{where}.lora_B.default.weight"].any(), "an adapter begins by changing nothing"


def mixtral() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=20, num_local_experts=11)
    return AutoModelForCausalLM.from_config(config)


def test_experts_that_transformers_merges_are_read_one_by_one(tmp_path: Path) -> None:
    real = mixtral()
    real.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in stored
    with accelerate.init_empty_weights():
        model = mixtral()
    weights = InitialWeights(model, tmp_path, 0)
    weights.check()
    for (name, whole), parameter in zip(real.named_parameters(), model.parameters(), strict=True):
        size = whole.numel()
        for start, stop in ((0, size), (size // 3 + 1, size - size // 5), (size // 2, size // 2 + 1)):
            read = weights.read(parameter, start, stop)
            assert torch.equal(read, whole.detach().reshape(-1)[start:stop]), (name, start)
    stored.pop("model.layers.1.block_sparse_moe.experts.10.w1.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"layers.1.*w1.weight, which Transformers converts .* \(MergeModulelist, Concat"
    ):
        InitialWeights(model, tmp_path, 0).check()


class Own(nn.Module):
    """Nothing says how its parameter begins."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(2), persistent=False)


def hooked() -> nn.Module:
    model = empty()
    model.head.weight.register_hook(lambda gradient: gradient)
    return model


def untied() -> nn.Module:
    with accelerate.init_empty_weights():
        return gpt2()


def on_meta(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def act() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(build())

    return act


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nothing initialises it": (on_meta(Own), r"0 \(Own\) has the parameter scale on the meta device and nothing that"),
    "buffer": (on_meta(WithBuffer), r"buffer 0.table is on the meta device.*accelerate.init_empty_weights"),
    "hooks": (hooked, r"parameter head.weight is on the meta device and has hooks"),
    "untied": (untied, r"lm_head.weight and transformer.wte.weight are tied .* call model.tie_weights\(\)"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_are_refused(what: str) -> None:
    build, sentence = MODELS[what]
    with pytest.raises(UserError, match=sentence):
        InitialWeights(build(), None, 0).check()


def missing(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def changed(act: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def indexed(files: dict[str, str] | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.dumps({"weight_map": files}) if files else "{"
        (folder / "model.safetensors.index.json").write_text(told)

    return change


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (missing, r"a folder with neither model.safetensors nor"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"abc" * 9), r"can't be read as safetensors"),
    "missing": (
        changed(lambda t: [t.pop(k) for k in list(t)[:5]]),
        r"lack embed.weight, .* and 2 more of Llama: .*save_original_format",
    ),
    "unexpected": (changed(lambda t: t.update(more=torch.ones(1))), r"have more, which Llama does not have"),
    "shape": (
        changed(lambda t: t.update({"norm.weight": torch.ones(3)})),
        r"norm.weight of shape \(3,\), and the model's is \(32,\)",
    ),
    "dtype": (
        changed(lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int8)})),
        r"norm.weight as I8, and the model's is float32",
    ),
    "index": (indexed(None), r"is no index of safetensors"),
    "index lacks": (indexed({"embed.weight": "gone.safetensors"}), r"gone.safetensors can't be read"),
    "index is wrong": (indexed({"other": "model.safetensors"}), r"lacks other, which"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_refused(tmp_path: Path, what: str) -> None:
    change, sentence = FILES[what]
    save_file(Llama(TINY).state_dict(), tmp_path / "model.safetensors")
    change(tmp_path)
    for model in (empty(), Llama(TINY)):
        with pytest.raises(UserError, match=sentence):
            InitialWeights(model, tmp_path, 0).check()


def test_a_path_and_an_optimizer_that_are_refused(tmp_path: Path) -> None:
    config = hm.TrainerConfig(batch_tokens=64, max_steps=1, run_dir=tmp_path)
    trainer = hm.Trainer(empty(), None, [[1, 2, 3]], config, weights=tmp_path / "gone")
    with pytest.raises(UserError, match=r"weights is '.*gone', which is not there"):
        trainer.fit()
    model = empty()
    with pytest.raises(UserError, match=r"Adagrad has state on the meta device"):
        hm.Trainer(model, torch.optim.Adagrad(model.parameters()), [[1, 2, 3]], config).fit()
