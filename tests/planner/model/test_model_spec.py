import json

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.model.spec import MODELS, ModelSpec, load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
TOML = """
num_hidden_layers = 2
hidden_size = 64
num_attention_heads = 4
vocab_size = 256
"""


def config(tmp_path, data):
    (tmp_path / "some-model").mkdir(exist_ok=True)
    path = tmp_path / "some-model" / "config.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def toml(tmp_path, text):
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "billions"),
    # published counts; qwen3-8b's includes its query and key norms, too small to show here
    [("llama-3-8b", 8.030), ("llama-3-70b", 70.554), ("mixtral-8x7b", 46.703), ("qwen3-8b", 8.191)],
)
def test_built_in_models_have_their_published_size(name, billions):
    assert MODELS[name].parameters() / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize(("name", "billions"), [("gpt-7b", 7.117), ("gpt-13b", 13.116), ("gpt-30b", 31.525)])
def test_flexsp_models_have_flexsp_size(name, billions):
    # FlexSP counts 2^30 and a learned position table of 192K rows
    spec = MODELS[name]
    assert (spec.parameters() + 196_608 * spec.hidden) / 2**30 == pytest.approx(billions, rel=0.01)


def test_operations_of_a_tiny_model_by_hand():
    spec = ModelSpec(name="t", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=3, intermediate=16, vocab=10)
    projections = 8 * 12 + 2 * 8 * 6 + 12 * 8
    assert spec.flops_per_token() == 2 * (2 * (projections + 3 * 8 * 16) + 8 * 10)
    # causal: half of the s*s pairs, 2 products of 2 operations per head dimension
    assert spec.flops_per_token2() == 2 * (4 * 3) * 2 * 2 // 2
    assert spec.parameters() == 2 * (projections + 3 * 8 * 16 + 2 * 8) + 8 + 2 * 80


def test_experts_count_as_memory_but_only_active_ones_as_work():
    dense = MODELS["llama-3-8b"]
    sparse = MODELS["mixtral-8x7b"]
    mlp = 3 * 4096 * 14336
    assert sparse.parameters() - dense.parameters() == 32 * (7 * mlp + 8 * 4096) - 2 * (128_256 - 32_000) * 4096
    assert sparse.flops_per_token() - dense.flops_per_token() == 2 * (32 * (mlp + 8 * 4096) - (128_256 - 32_000) * 4096)


def test_hugging_face_config(tmp_path):
    spec = load_model(config(tmp_path, LLAMA))
    assert spec == ModelSpec(**{**{f: getattr(MODELS["llama-3-8b"], f) for f in spec.__slots__}, "name": "some-model"})


def test_hugging_face_config_of_gpt2(tmp_path):
    data = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "vocab_size": 50257}
    spec = load_model(config(tmp_path, data))
    assert (spec.intermediate, spec.kv_heads, spec.tied_embeddings, spec.gated_mlp) == (3072, 12, True, False)
    # 124 M with the position table, biases and norm biases that the shape leaves out
    assert spec.parameters() / 1e6 == pytest.approx(124.4 - 0.79, rel=0.01)


def test_hugging_face_config_of_experts(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 100, "head_dim": 64}
    spec = load_model(config(tmp_path, LLAMA | experts))
    assert (spec.experts, spec.experts_per_token, spec.intermediate, spec.head_dim) == (4, 2, 100, 64)


def test_text_part_of_a_multimodal_config(tmp_path):
    assert load_model(config(tmp_path, {"model_type": "gemma3", "text_config": LLAMA})).layers == 32


def test_toml(tmp_path):
    spec = load_model(toml(tmp_path, TOML + "num_key_value_heads = 2\ngated_mlp = false\n"))
    assert (spec.name, spec.head_dim, spec.kv_heads, spec.intermediate) == ("tiny", 16, 2, 256)
    assert not spec.gated_mlp


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 5}, "32 query heads can't share 5 key/value heads evenly"),
        ({"hidden_size": 4095}, "hidden_size 4095 is not a multiple of num_attention_heads 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be above zero"),
        ({"vocab_size": "many"}, "vocab_size is 'many': it must be a whole number"),
        ({"num_attention_heads": None}, "lacks the key 'num_attention_heads'"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "3 of 2 experts per token is not possible"),
        ({"num_experts": 2}, "0 of 2 experts per token is not possible"),
        ({"kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_bad_configs(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        load_model(config(tmp_path, LLAMA | change))
    assert words in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"'gpt-8b' is not built in: use one of gpt-7b, .*, a Hugging Face config.json"):
        load_model("gpt-8b")
    with pytest.raises(UserError, match=r"unknown key 'hiden_size' .did you mean 'hidden_size'"):
        load_model(toml(tmp_path, TOML.replace("hidden_size", "hiden_size")))
    with pytest.raises(UserError, match="line 4 is not TOML"):
        load_model(toml(tmp_path, TOML.replace("= 4", "= four")))
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_model(config(tmp_path, '{"hidden_size": 1,\n oops}'))
    with pytest.raises(UserError, match="holds no JSON object"):
        load_model(config(tmp_path, "[]"))
    with pytest.raises(UserError, match="does not exist"):
        load_model(str(tmp_path / "none.json"))
