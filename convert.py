"""Weights of others in: the authors' released checkpoint becomes a directory that
`BrgSA.from_pretrained` loads.

    python convert.py official official.ckpt --tokenizer path/to/their-bert --out runs/official

A PyTorch Lightning .ckpt is a pickle, and unpickling runs whatever code it names. Here it is read
as data (see `Checkpoint`): nothing that it names is imported or called.
"""
import argparse
import pickle
import re
import sys
import zipfile
from collections import OrderedDict


def parse():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    official = commands.add_parser("official", help="the authors' released checkpoint")
    official.add_argument("checkpoint", help="a PyTorch Lightning .ckpt")
    official.add_argument("--tokenizer", required=True, help="their BERT's directory")
    official.add_argument("--out", required=True, help="the directory to write")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    parse()  # before torch is loaded, so that it is quick

import torch

from data import run_command
from model import BrgSA, Config, from_bert, read_tokenizer

# How the authors' names begin, below `gloria.` -> the part of BrgSA (text's are renamed further).
TABLE = {
    "text_encoder.model.": "text",
    "text_encoder.emb_global.": "text_projection",
    "img_encoder.model.": "vision",
    "img_encoder.global_embedder.": "vision_projection",
    "dictionarylearning.dictionary.": "bank",
}
PLACE = re.compile(rf"gloria\.({'|'.join(map(re.escape, TABLE))})(.*)", re.DOTALL)
UNUSED = re.compile(r"emb_local|local_embedder")  # the method doesn't use the local embedders


# ---- A pickle, read as data ----------------------------------------------------------------------
#
# A pickle is a small program: "take the class or function of this name, call it with these
# arguments, set this state". Who wrote the file chose the names, so one of them may be os.system.
# `Checkpoint` looks up none of them. It knows the few that tensors in plain containers need, and
# has something harmless for each:
#
#     OrderedDict                      itself
#     FloatStorage and its siblings    the dtype that they stand for
#     _rebuild_tensor_v2               a function that notes where the tensor's bytes are
#     _rebuild_parameter               a function that returns the tensor alone
#     getattr, for a class in a class  a function that returns Inert
#
# Every other name is Inert, a class that takes any argument and any state and does nothing. It is
# needed because the released file also holds settings (OmegaConf's objects), callbacks and the
# optimiser's state, which are of no use here.

class Inert:
    """What any class or function of a pickle becomes: it takes everything and does nothing."""

    def __init__(self, *_, **__):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


def _reference(storage, offset, shape, stride, *_):
    return storage, offset, shape, stride


# What a name in the pickle stands for, whatever its module.
KNOWN = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "OrderedDict": OrderedDict,
    "_rebuild_tensor_v2": _reference,
    "_rebuild_parameter": lambda data, *_: data,
    "getattr": lambda *_: Inert,  # a class within a class
}


class Checkpoint(pickle.Unpickler):
    """A torch.save'd file read as data: tensors come as references, read when asked for."""

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in self.archive.infolist()):
            raise ValueError("it is compressed, as torch.save never does")
        names = [name for name in self.archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
        if not names:
            raise ValueError("no data.pkl in it")
        self.root = names[0].removesuffix("data.pkl")
        super().__init__(self.archive.open(names[0]))

    def find_class(self, module, name):
        return KNOWN.get(name, Inert)

    def persistent_load(self, storage):
        return storage[1:3]  # its type and its key

    def tensor(self, reference):
        """The tensor that a reference stands for."""
        (dtype, key), offset, shape, stride = reference
        content = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(content, dtype=dtype).as_strided(shape, stride, offset).clone()


# ---- From its weights to a model -----------------------------------------------------------------

def read_parts(checkpoint):
    """({part of BrgSA: {name: float tensor}}, the names under `gloria.` that have no place)."""
    parts, left_out = {part: {} for part in TABLE.values()}, []
    try:
        reader = Checkpoint(checkpoint)
        for name, value in reader.load()["state_dict"].items():
            place = PLACE.match(name)
            if place:
                prefix, inner = place.groups()
                parts[TABLE[prefix]][inner] = reader.tensor(value).float()
            elif name.startswith("gloria.") and not UNUSED.search(name):
                left_out.append(name)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint}: no such file") from None
    except Exception as error:  # whatever a damaged or foreign pickle may raise
        raise ValueError(
            f"{checkpoint}: can't be read as a PyTorch Lightning checkpoint "
            f"({type(error).__name__}: {ascii(str(error))})"
        ) from None
    return parts, left_out


def config_of(parts):
    """The Config that the tensors' shapes tell; heads are 64 wide and the crop's grid is a cube."""
    text, vision = parts["text"], parts["vision"]
    patches = vision["patch_embed.proj.weight"]
    width, patch = len(patches), patches.shape[2:]
    side = round((vision["pos_embed"].shape[1] - 1) ** (1 / 3))
    positions = text["embeddings.position_embeddings.weight"]
    text_width = positions.shape[1]
    bank = parts["bank"]["weight"]
    return Config(
        crop=tuple(side * size for size in patch),
        patch=tuple(patch),
        vit_width=width,
        vit_depth=depth_of(vision, r"blocks\.(\d+)"),
        vit_heads=width // 64,
        vocabulary=len(text["embeddings.word_embeddings.weight"]),
        text_width=text_width,
        text_depth=depth_of(text, r"encoder\.layer\.(\d+)"),
        text_heads=text_width // 64,
        text_mlp=len(text["encoder.layer.0.intermediate.dense.bias"]),
        text_positions=len(positions),
        bank_size=len(bank),
        dim=bank.shape[1],
    )


def depth_of(names, pattern):
    """How many layers the names tell."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def convert(checkpoint, tokenizer, out):
    """The authors' released Lightning checkpoint -> a directory for `BrgSA.from_pretrained`.

    tokenizer: directory with their BERT's tokenizer.json or vocab.txt. Returns the model, and the
    names in the checkpoint that have no place in it. Raises ValueError where a file is damaged or
    something else.
    """
    tokenizer = read_tokenizer(tokenizer)
    parts, left_out = read_parts(checkpoint)
    try:
        model = BrgSA(config_of(parts), tokenizer)
        parts["text"] = from_bert(parts["text"], model.config.text_depth, checkpoint)
        for part, weights in parts.items():
            getattr(model, part).load_state_dict(weights)
    except KeyError as error:
        raise ValueError(
            f"{checkpoint}: lacks {error}, so it is not the authors' checkpoint"
        ) from None
    except (RuntimeError, IndexError, TypeError, ArithmeticError) as error:  # a shape of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: is not the authors' checkpoint: {reason}") from None
    model.save_pretrained(out)
    return model.eval(), left_out


# ---- Command line --------------------------------------------------------------------------------

def main():
    """The command line."""
    a = parse()
    model, left_out = convert(a.checkpoint, a.tokenizer, a.out)
    weights = sum(weight.numel() for weight in model.parameters())
    pieces = model.text.tokenizer.get_vocab_size()
    no_place = f"; no place for {', '.join(map(ascii, left_out))}" if left_out else ""
    print(f"{a.out}: {weights:,} weights; a tokenizer of {pieces} pieces for "
          f"{model.config.vocabulary} embeddings{no_place}")


if __name__ == "__main__":
    sys.exit(run_command(main))
