"""Weights of others in: the authors' released checkpoint becomes a directory for `BrgSA.from_pretrained`; nothing pickled in it is run.

    python convert.py official official.ckpt --tokenizer path/to/their-bert --out runs/official
"""
import argparse
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from model import BrgSA, Config, _from_bert, _read_tokenizer


class _Inert:
    """What any class or function of a pickle becomes, unless it is a tensor's or a plain container: takes everything, does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def _nothing(self, *_, **__):
        pass
    __setstate__ = __setitem__ = append = extend = add = _nothing


class _Checkpoint(pickle.Unpickler):
    """A torch.save'd file read as data: tensors come as (storage, offset, shape, stride), and a `tensor` is read only when asked for."""
    DTYPES = {f"{name}Storage": dtype for name, dtype in dict(
        Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Double=torch.float64, Long=torch.int64, Int=torch.int32,
        Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in self.archive.infolist()):
            raise ValueError("it is compressed, as torch.save never does")
        names = [name for name in self.archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if not names:
            raise ValueError("no data.pkl in it")
        self.root = names[0].removesuffix("data.pkl")
        super().__init__(self.archive.open(names[0]))

    def find_class(self, module, name):
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        return {("collections", "OrderedDict"): OrderedDict,
                ("builtins", "getattr"): lambda *_: _Inert, ("__builtin__", "getattr"): lambda *_: _Inert,  # a class within a class
                ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride),
                ("torch._utils", "_rebuild_parameter"): lambda data, *_: data}.get((module, name), _Inert)

    def persistent_load(self, storage):
        _, dtype, key, _, _ = storage
        return dtype, key

    def tensor(self, reference):
        (dtype, key), offset, shape, stride = reference
        storage = torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=dtype)
        return storage.as_strided(shape, stride, offset).clone()


def convert(checkpoint, tokenizer, out):
    """The authors' released PyTorch Lightning checkpoint (its tensors are named `gloria.*`) -> a directory for `BrgSA.from_pretrained`.

    tokenizer: directory with their BERT's tokenizer.json or vocab.txt. Heads are 64 wide and the crop's grid is a cube, as theirs. Returns the model
    and the names under `gloria.` that have no place in it, but for the local embedders, which the method doesn't use. Raises ValueError where a
    file is damaged or something else.
    """
    tokenizer = _read_tokenizer(Path(tokenizer))
    parts = {part: {} for part in ("text_encoder.model.", "img_encoder.model.", "text_encoder.emb_global.", "img_encoder.global_embedder.", "dictionarylearning.dictionary.")}
    left_out = []
    try:
        reader = _Checkpoint(checkpoint)
        for name, value in reader.load()["state_dict"].items():
            part = next((part for part in parts if name.startswith(f"gloria.{part}")), None)
            if part:
                parts[part][name.removeprefix(f"gloria.{part}")] = reader.tensor(value).float()
            elif name.startswith("gloria.") and not re.search(r"emb_local|local_embedder", name):
                left_out.append(name)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint}: no such file") from None
    except Exception as error:  # whatever a damaged or foreign pickle may raise
        raise ValueError(f"{checkpoint}: can't be read as a PyTorch Lightning checkpoint ({type(error).__name__}: {ascii(str(error))})") from None

    bert, vision, text_projection, vision_projection, dictionary = parts.values()
    depth = lambda names, pattern: len({match[1] for name in names if (match := re.match(pattern, name))})
    try:
        patches, positions = vision["patch_embed.proj.weight"], bert["embeddings.position_embeddings.weight"]
        bank = dictionary["weight"]
        side = round((vision["pos_embed"].shape[1] - 1) ** (1 / 3))
        config = Config(
            crop=tuple(side * size for size in patches.shape[2:]), patch=tuple(patches.shape[2:]), vit_width=len(patches),
            vit_depth=depth(vision, r"blocks\.(\d+)"), vit_heads=len(patches) // 64, vocabulary=len(bert["embeddings.word_embeddings.weight"]),
            text_width=positions.shape[1], text_depth=depth(bert, r"encoder\.layer\.(\d+)"), text_heads=positions.shape[1] // 64,
            text_positions=len(positions), bank_size=len(bank), dim=bank.shape[1])
        model = BrgSA(config, tokenizer)
        model.text.load_state_dict(_from_bert(bert, config.text_depth, checkpoint))
        model.vision.load_state_dict(vision)
        model.vision_projection.load_state_dict(vision_projection)
        model.text_projection.load_state_dict(text_projection)
        model.bank.load_state_dict(dictionary)
    except KeyError as error:
        raise ValueError(f"{checkpoint}: lacks {error}, so it is not the authors' checkpoint") from None
    except (RuntimeError, IndexError, TypeError, ArithmeticError) as error:  # a tensor of another shape than the released one's
        raise ValueError(f"{checkpoint}: is not the authors' checkpoint: {' '.join(str(error).split())}") from None
    model.save_pretrained(out)
    return model.eval(), left_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["official"])
    parser.add_argument("checkpoint", help="the authors' PyTorch Lightning .ckpt")
    parser.add_argument("--tokenizer", required=True, help="directory with their BERT's tokenizer.json or vocab.txt")
    parser.add_argument("--out", required=True, help="directory to write config.json, tokenizer.json and model.safetensors into")
    arguments = parser.parse_args()
    try:
        model, left_out = convert(arguments.checkpoint, arguments.tokenizer, arguments.out)
    except (ValueError, OSError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.out}: {sum(weight.numel() for weight in model.parameters()):,} weights; a tokenizer of {model.text.tokenizer.get_vocab_size()} pieces "
          f"for {model.config.vocabulary} embeddings" + (f"; no place for {', '.join(map(ascii, left_out))}" if left_out else ""))


if __name__ == "__main__":
    main()
