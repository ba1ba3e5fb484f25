"""The decoder: parity with transformers (or with golden files without it), sampling, errors."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llm import LLM, Config, attend, attend_with_lse, choose

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "decoders.json"
BASE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "eos_token_id": [3, 5],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA = BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": LLAMA,
    "llama, grouped queries off": LLAMA | {"num_key_value_heads": 4},
    "llama 3, rope scaling, tied, biases": LLAMA
    | {
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3,
        "rope_theta": 5e5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama, linear rope scaling": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral, sliding window": BASE
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
    "qwen2, tied": BASE
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, some layers slide": BASE
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3, head_dim of its own": BASE
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
}


def weights_of(config, seed=0):
    """Random weights from (config, seed), large enough that answers differ, in length too."""
    numbers = random.Random(seed)
    shapes = Config.from_dict(config).shapes()
    generator = torch.Generator().manual_seed(numbers.randrange(10**6))
    return {
        name: torch.randn(shape, generator=generator) * 0.3
        + (1.0 if len(shape) == 1 and name.endswith("norm.weight") else 0.0)
        for name, shape in shapes.items()
    }


def checkpoint(directory, config=LLAMA, seed=0, shards=1):
    """A checkpoint: random weights (in `shards` files), a small tokenizer, a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = weights_of(config, seed)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    else:
        where = {
            name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(weights)
        }
        for file in set(where.values()):
            save_file(
                {name: weight for name, weight in weights.items() if where[name] == file},
                directory / file,
                {"format": "pt"},
            )
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["there is pleural effusion; no nodule"] * 9,
        trainers.BpeTrainer(
            vocab_size=config["vocab_size"],
            special_tokens=["<pad>", "<s>", "<|user|>", "</s>", "<|assistant|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
            }
        )
    )
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }}<|user|>{{ messages[-1]['content'] }}<|assistant|>"
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    return directory


def prompts(lengths=(5, 17, 1, 40, 9, 23), head=30):
    numbers = random.Random(1)
    head = [numbers.randrange(6, 300) for _ in range(head)]
    return [head + [numbers.randrange(6, 300) for _ in range(length)] for length in lengths]


def greedy(llm, prompts, **settings):
    return [ids for _, ids in sorted(llm.generate_ids(prompts, 24, **settings))]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = checkpoint(
        tmp_path,
        FAMILIES[family],
        shards=3 if family in ("llama", "qwen3, head_dim of its own") else 1,
    )
    llm, peer = (
        LLM.from_pretrained(directory, "cpu"),
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(),
    )
    ids = torch.randint(6, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (llm.logits(ids) - peer(ids).logits).abs().max() < 1e-4
        wanted = [
            peer.generate(
                torch.tensor([p]),
                attention_mask=torch.ones(1, len(p)),
                max_new_tokens=24,
                do_sample=False,
            )[0, len(p) :].tolist()
            for p in prompts()
        ]
    wanted = [[token for token in row if token not in (3, 5)] for row in wanted]
    for batch_size in (1, 4, 6):
        for share in (True, False):
            assert greedy(llm, prompts(), batch_size=batch_size, share_prefix=share) == wanted


def golden():
    """A few logits of the last position and greedy tokens of every family."""
    values = {}
    for family, config in FAMILIES.items():
        llm = LLM(config, weights_of(config), ROOT)
        llm.stops = {3, 5}
        values[family] = {
            "logits": [
                round(x, 3) for x in llm.logits(torch.tensor([prompts()[0]]))[0, -1, :8].tolist()
            ],
            "tokens": greedy(llm, prompts()),
        }
    return values


def test_golden_answers_stay_without_transformers():
    for (family, now), then in zip(golden().items(), json.loads(GOLDEN.read_text()).values()):
        assert now["logits"] == pytest.approx(then["logits"], abs=3e-3), family
        assert now["tokens"] == then["tokens"], family


def test_attention_with_a_shared_head_equals_attention_over_both_parts():
    B, H, Q, S, N, D = 3, 2, 4, 7, 5, 8
    q, k, v, hk, hv = (
        torch.randn(shape)
        for shape in ((B, H, Q, D), (B, H, S, D), (B, H, S, D), (1, H, N, D), (1, H, N, D))
    )
    mask = torch.zeros(B, 1, Q, S).masked_fill(torch.rand(B, 1, Q, S) < 0.3, -1e9)
    whole_k, whole_v = (
        torch.cat((hk.expand(B, -1, -1, -1), k), 2),
        torch.cat((hv.expand(B, -1, -1, -1), v), 2),
    )
    wanted = (
        torch.softmax(q @ whole_k.mT / D**0.5 + torch.cat((torch.zeros(B, 1, Q, N), mask), -1), -1)
        @ whole_v
    )
    torch.testing.assert_close(attend(q, k, v, mask, (hk, hv)), wanted, atol=1e-5, rtol=1e-5)
    on_gpu_way = ((q @ k.mT) * D**-0.5 + mask).logsumexp(-1)
    torch.testing.assert_close(attend_with_lse(q, k, v, mask)[1], on_gpu_way, atol=1e-5, rtol=1e-5)


def test_sampling_follows_seed_and_nucleus_whatever_the_batch(tmp_path):
    llm = LLM.from_pretrained(checkpoint(tmp_path), "cpu")
    sampled = greedy(llm, prompts(), temperature=1.0, top_p=0.9, seed=1, batch_size=6)
    assert sampled == greedy(llm, prompts(), temperature=1.0, top_p=0.9, seed=1, batch_size=2)
    assert sampled != greedy(llm, prompts(), temperature=1.0, top_p=0.9, seed=2)
    assert greedy(llm, prompts(), temperature=1.0, top_p=1e-6) == greedy(llm, prompts())
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(
        probabilities.log().expand(4000, 4),
        1.0,
        0.9,
        torch.rand(4000, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.bincount(drawn, minlength=4) / 4000 == pytest.approx(
        (probabilities * torch.tensor([1, 1, 1, 0])) / 0.95, abs=0.03
    )


def test_generate_takes_text_and_bfloat16_weights(tmp_path):
    directory = checkpoint(tmp_path)
    save_file(
        {
            name: weight.bfloat16()
            for name, weight in load_file(directory / "model.safetensors").items()
        },
        directory / "model.safetensors",
    )
    for dtype in (None, torch.float32):
        llm = LLM.from_pretrained(directory, "cpu", dtype)
        texts = llm.generate(["<|user|>there is pleural", "no"], max_new_tokens=8)
        assert len(texts) == 2 and all(isinstance(text, str) and "<|" not in text for text in texts)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    llm = LLM.from_pretrained(checkpoint(tmp_path), "cpu")
    with pytest.raises(ValueError, match="must fit a context of 256"):
        list(llm.generate_ids([[7] * 250], 10))


if __name__ == "__main__":  # python -m tests.test_llm writes the golden file
    GOLDEN.write_text(json.dumps(golden(), separators=(",", ":")) + "\n")
