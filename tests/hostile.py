"""Damaged and foreign files for tests/test_hostile.py and `python bench.py hostile`."""
import json
import signal
from pathlib import Path

import nibabel
import numpy as np
import torch
from safetensors.torch import save_file

import convert
import data
import distil
import evaluate
import llm
import phantom
import summarize
from model import BrgSA, Config, train_tokenizer

# A small good file of each kind is damaged or made foreign at random, and handed to its reader:
# what comes back is a result or one line that names the file, soon, in little memory.

TINY_MODEL = dict(
    shape=(16, 16, 16), crop=(16, 16, 16), patch=(8, 8, 8), vit_width=12, vit_depth=1, vit_heads=2,
    vocabulary=90, text_width=8, text_depth=1, text_heads=2, text_mlp=16, text_positions=32, dim=8,
    bank_size=4)
TINY_LLM = dict(
    architectures=["LlamaForCausalLM"], num_hidden_layers=1, vocab_size=90, hidden_size=8,
    intermediate_size=16, num_attention_heads=2, max_position_embeddings=128, eos_token_id=0,
    rope_theta=1e4)
TEMPLATE = """{% for m in messages %}<{{ m.role }}> {{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TEMPLATE_PARTS = (
    "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ messages[7].content }}", "{% if", "{{ ''.__class__.__mro__ }}", "{% set m = 3 %}",
    "{{ messages | tojson * 1000 }}", "{{ strftime_now('%d %B %Y') }}", "{{ ns.x }}",
    "{{ 'a' * 10**9 }}")
FOREIGN_VALUES = (
    None, True, -1, 0, 3, 10**9, 10**30, 1e308, float("nan"), "", "text", [], [[]], {}, {"a": 1},
    "x" * 999)
FOREIGN_BYTES = (
    b"\0", b"\xff" * 8, b'"', b",", b"\n", b"[" * 3000, b"\r", b"1e999", b"\x00\x00\x80\x7f")


def write_good_files(folder):
    """A good file of each kind in a folder of its own: {kind: (path, what is damaged, reader)}."""
    folder, rng = Path(folder), np.random.default_rng(0)
    voxels = rng.integers(-1000, 400, (20, 18, 16)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.diag([-8, -8, 8, 1]))
    for name in ("scan.nii", "packed.nii.gz"):
        nibabel.save(image, folder / name)
    nibabel.save(nibabel.Nifti2Image(voxels, image.affine), folder / "second.nii")
    np.savez(folder / "ct.npz", ct=voxels)
    torch.save({"state_dict": {"gloria.a": torch.ones(3)}}, folder / "official.ckpt")
    tokenizer = train_tokenizer([], 90)
    BrgSA(Config(**TINY_MODEL), tokenizer).save_pretrained(folder / "run")
    write_llm(folder / "llm", tokenizer)
    label = f"label:{data.CT_RATE[0]}"
    lines = [["name", "path", "split", "patient", "report", label]]
    for i in range(4):
        lines.append([f"v{i}", "scan.nii", "valid", f"p{i}", f"A nodule, {i} mm.\nNo mass.", i % 2])
    data.write_csv(folder / "manifest.csv", lines)
    data.write_csv(folder / "scores.csv", [["name", "a", "b"], ["v0", 0.1, 0.2], ["v1", 0.3, 0.4]])
    record = {"report_sha256": "0" * 64, "abnormalities": ["Mass"], "summary": "There is mass."}
    (folder / "summaries.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "prompts.json").write_text(json.dumps({"Mass": {"positive": ["There is mass"]}}))
    pairs = [{"report": f"A mass of {i} mm.", "abnormalities": ["Lung mass"]} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stamp = {"version": phantom.VERSION, "seed": 0}
    (folder / "phantom.json").write_text(json.dumps(stamp))
    rad = "imgtest_Abnormality_and_Location_Labels.csv"
    data.write_csv(folder / rad, [["NoteAcc_DEID", "nodule*lung"], ["a", 1], ["b", 0]])
    readers = {
        "pairs.jsonl": distil.read_pairs,
        "phantom.json": lambda path: phantom.check_folder(path.parent, stamp),
        rad: lambda path: data.rad_chestct_manifest(path.parent, "test"),
        "scan.nii": read_scan, "packed.nii.gz": read_scan, "second.nii": read_scan,
        "ct.npz": read_scan, "manifest.csv": read_manifests, "scores.csv": evaluate.read_scores,
        "summaries.jsonl": data.read_summaries, "official.ckpt": convert.read_parts,
        "prompts.json": lambda path: evaluate.make_prompts(None, [path])}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        readers[f"run/{name}"] = read_run
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        readers[f"llm/{name}"] = read_llm
    return readers


def write_llm(folder, tokenizer):
    """A tiny Llama of random weights."""
    folder.mkdir()
    shapes = llm.Config(TINY_LLM).shapes()
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(TINY_LLM))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def read_scan(path):
    volume = data.read_volume(path)
    data.preprocess(volume.hu, volume.spacing, (8, 8, 8), (16, 16, 16))
    data.volume_problems(volume)


def read_manifests(path):
    data.read_manifest(path)
    summarize.read_manifest(path)


def read_run(path):
    BrgSA.from_pretrained(path.parent).encode_text(["There is mass"])


def read_llm(path):
    model = llm.LLM.from_pretrained(path.parent, "cpu")
    chat = llm.Chat(path.parent, "Name what is there.")
    model.generate([chat.prompts(["A nodule."], 100)[0][0]], 2)


def damaged(content, name, rng):
    """The bytes of a file with one to three damages."""
    if name.endswith("json") and rng.random() < 0.6:
        return foreign_json(json.loads(content), rng)
    content = bytearray(content)
    if name.endswith("jinja"):
        at = rng.integers(len(content) + 1)
        content[at:at] = rng.choice(TEMPLATE_PARTS).encode()
        return bytes(content)
    for _ in range(rng.integers(1, 4)):
        # most of what matters to a reader stands at the beginning
        reach = len(content) if rng.random() < 0.5 else min(len(content), 400)
        at, kind = int(rng.integers(reach + 1)), rng.integers(5)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at:at + rng.integers(1, 50)]
        elif kind == 2:
            content[at:at + 4] = rng.bytes(4)
        elif kind == 3:
            foreign = FOREIGN_BYTES[rng.integers(len(FOREIGN_BYTES))]
            content[at:at + len(foreign)] = foreign
        else:
            content[at:at] = FOREIGN_BYTES[rng.integers(len(FOREIGN_BYTES))]
    return bytes(content)


def foreign_json(value, rng):
    """A JSON object with one value replaced by a foreign one, or left out."""
    keys = list(value)
    if keys:
        key = keys[rng.integers(len(keys))]
        value[key] = FOREIGN_VALUES[rng.integers(len(FOREIGN_VALUES))]
        if rng.random() < 0.2:
            del value[key]
    return json.dumps(value).encode()


class TooLong(BaseException):
    """A reader took over ten seconds."""


def outcome(read, path):
    """"read", "refused" in one line that names the file, or what else came of it."""
    def stop(number, frame):
        raise TooLong
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        read(path)
        return "read"
    except (ValueError, OSError) as error:
        named = str(path.parent) in str(error) and "\n" not in str(error)
        return "refused" if named else f"not one line that names it: {str(error)[:300]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)


def hostile_outcomes(folder, n, seed):
    """Yield (file, outcome) of n damaged files, each of which replaces the good one for a while."""
    readers = write_good_files(folder)
    names, rng = sorted(readers), np.random.default_rng(seed)
    for i in range(n):
        name = names[i % len(names)]
        path = Path(folder, name)
        good = path.read_bytes()
        path.write_bytes(damaged(good, name, rng))
        result = outcome(readers[name], path)
        if result not in ("read", "refused"):
            (path.parent / f"fault-{seed}-{i}{path.suffix}").write_bytes(path.read_bytes())
        path.write_bytes(good)
        yield name, result
