"""`import`: a checkpoint of the released code of CBDM, or of T2H (OC_LT), which is built on CBDM's, as a run folder.

Their U-Net is `networks.UNet` under other names (qym7/CBDM-pytorch, MediaBrain-SJTU/OC_LT), with the same time features bit for bit. Only
widths that are multiples of 128 can be read: narrower nets normalise groups of fewer channels there. The file is read with
weights_only=True, so nothing that a pickle says is ever run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, config, run_images
from .config import ImageConfig
from .data import resolve_imbalance
from .methods.ddpm import Denoise
from .networks import time_features
from .runfolder import open_folder

PARTS = ("net_model", "ema_model", "optim", "step")  # what is read; sched follows from the step, fixed_x_T is of their pictures
TABLE = "time_embedding.timembedding.0.weight"  # (T, width), the time features as a constant
DATA = {"cifar10": "cifar10", "cifar100": "cifar100", "cifar10lt": "cifar10-lt", "cifar100lt": "cifar100-lt"}
NAMES = (  # a layer here, there; one after another
    (r"^condition\.time\.0\.", "time_embedding.timembedding.1."),
    (r"^condition\.time\.2\.", "time_embedding.timembedding.3."),
    (r"^condition\.label\.", "label_embedding."),
    (r"^condition\.augment\.", "augm_embedding."),
    (r"^inside\.", "head."),
    (r"^outside\.", "tail."),
    (r"^(down|up)\.(\d+)\.(?:1\.)?(weight|bias)$", r"\1blocks.\2.main.\3"),  # between two levels
    (r"^(down|middle|up)\.", r"\1blocks."),
    (r"\.first\.", ".block1."),
    (r"\.condition\.", ".temb_proj."),
    (r"\.second\.", ".block2."),
    (r"\.attention\.norm\.", ".attn.group_norm."),
    (r"\.attention\.([qkv])\.", r".attn.proj_\1."),
    (r"\.attention\.out\.", ".attn.proj."),
)
SHARED = {  # flags that both have, with their defaults
    "beta_1": 1e-4, "beta_T": 0.02, "T": 1000, "var_type": "fixedlarge", "dropout": 0.1, "lr": 2e-4, "grad_clip": 1.0, "img_size": 32,
    "warmup": 5000, "batch_size": 128, "ema_decay": 0.9999, "conditional": False, "augm": False, "cfg": False, "data_type": "cifar100",
    "imb_factor": 0.01, "num_class": 0.0, "num_images": 50000,
}  # fmt: skip
FLAGS = {
    "cbdm": {**SHARED, "total_steps": 800_000, "cb": False, "tau": 1.0, "finetune": False},
    "oc_lt": {**SHARED, "total_steps": 500_001, "transfer_x0": False, "transfer_tr_tau": False, "transfer_mode": "full", "tr_tau": 1.0},
}


def main(arguments: Sequence[str]) -> int:
    text = "A checkpoint of the released code of CBDM or T2H as a run folder."
    parser = argparse.ArgumentParser(prog="python -m training import", description=text, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="ckpt_STEP.pt")
    parser.add_argument("--from", dest="source", choices=tuple(FLAGS), required=True, help="whose code wrote it: CBDM's, or T2H's (OC_LT)")
    parser.add_argument("--flagfile", type=Path, help="its flags; default: flagfile.txt beside it, where the released code leaves it")
    parser.add_argument("--dataset", help="the training set; default: the flags' data_type")
    parser.add_argument("--root", default="data", help="folder with downloaded data sets")
    parser.add_argument("--out", help="run folder; default: runs/METHOD-DATASET-0")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    options = vars(parser.parse_args(arguments))
    folder, method, step = import_checkpoint(options.pop("checkpoint"), options.pop("source"), **options)
    print(f"{folder} is a run of {method} after {step} steps; go on with: python -m training sample {folder}, evaluate {folder}/samples")
    return 0


def import_checkpoint(
    path: Path, source: str, *, flagfile: Path | None = None, dataset: str | None = None, root: str = "data", out: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, str, int]:  # fmt: skip
    """(run folder, method, steps) of the checkpoint `path` that the code of `source` (cbdm, oc_lt) wrote, with weights, average and Adam's
    moments. The training set has to be on this machine: the run's counts and rows are its. ValueError for whatever does not fit, before
    a folder is made."""
    parts = read(path)
    beside = path.with_name("flagfile.txt")
    flagfile = flagfile or (beside if beside.is_file() else None)
    given = {} if flagfile is None else read_flags(flagfile, FLAGS[source])
    if flagfile is None and dataset is None:
        raise ValueError(f"import: expected the training set in {beside}, --flagfile or --dataset; got none of them")
    facts = facts_of(parts["ema_model"], path)
    flags = {**FLAGS[source], "conditional": facts["num_class"] > 0, "augm": facts["augm"], **given}
    for name, fact in {**facts, "conditional": facts["num_class"] > 0}.items():
        stated = name in given and (name != "num_class" or given[name])  # 0 says nothing
        if stated and given[name] != fact:
            raise ValueError(f"import: {path} does not fit {flagfile}: {name} is {given[name]} there; the weights have {fact}")

    method, settings, preset = settings_of(source, flags, facts, dataset, root=root, out=out, overwrite=overwrite)
    train_set = run_images.load(method, settings)
    shape, classes = tuple(train_set.images.shape[1:]), train_set.num_classes
    if shape[1] != flags["img_size"]:
        raise ValueError(f"import: {path} was trained with img_size {flags['img_size']}; images of {settings.dataset} have {shape[1]}")
    if settings.conditional and classes != facts["num_class"]:
        raise ValueError(f"import: {path} knows {facts['num_class']} classes; {settings.dataset} has {classes}: give another --dataset")
    modules = run_images.build_modules(settings, shape, classes)
    for part, net in (("net_model", modules["net"]), ("ema_model", modules["ema"].net)):
        net.load_state_dict(renamed(parts[part], net, f"import: {path}: {part}"))
    optimiser = torch.optim.Adam([{"params": list(modules["net"].parameters()), "lr": settings.lr}])
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments(parts, modules["net"], f"import: {path}: optim")})

    folder, step = open_folder(method, settings, preset, train_set), parts["step"] + 1  # they save after the step of that number, from 0 on
    checkpoint.save(folder, Denoise.name, step, modules, optimiser, {})
    about = json.loads((folder / "config.json").read_text())
    checkpoint.write_json(folder / "config.json", {**about, "imported": {"from": source, "file": path.name}})
    return folder, method, step


# ---- the file --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"import: no such file: {path}")
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text recommends to run it all the same
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        asked = f"a pickle that asks for {wanted[1]}" if wanted else "another pickle"
        raise ValueError(f"import: {path}: expected tensors and plain values; got {asked}, which is not run") from error
    except Exception as error:  # torch has half a dozen types for a damaged file
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise ValueError(f"import: cannot read {path}: {reason}; is it cut off?") from error
    lacking = [name for name in PARTS if not isinstance(parts, dict) or name not in parts]
    if lacking:
        found = ", ".join(map(str, list(parts)[:6])) if isinstance(parts, dict) else type(parts).__name__
        raise ValueError(f"import: {path}: expected {', '.join(PARTS)}; {lacking[0]} is missing, got {found}")
    for name in PARTS[:2]:
        if not isinstance(parts[name], dict) or not all(isinstance(value, Tensor) for value in parts[name].values()):
            raise ValueError(f"import: {path}: {name} must be a dict of tensors")
    if not isinstance(parts["step"], int) or parts["step"] < 0:
        raise ValueError(f"import: {path}: step must be an int >= 0; got {parts['step']!r}")
    return parts


def facts_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int | bool]:
    """What the weights themselves say: T, ch, num_class (0: unconditional), augm."""
    for name in ("head.weight", TABLE):
        if name not in tensors or tensors[name].dim() != (2 if name == TABLE else 4):
            raise ValueError(f"import: {path}: ema_model is not this U-Net: expected {name}; got {', '.join(list(tensors)[:4])}, ..")
    width, table, label = len(tensors["head.weight"]), tensors[TABLE], tensors.get("label_embedding.weight")
    if width % 128:
        raise ValueError(f"import: {path}: ch must be a multiple of 128, where groups of channels are the same here and there; got {width}")
    features = time_features(torch.arange(1, len(table) + 1), width)
    if table.shape != features.shape or not torch.allclose(table, features, atol=1e-3):
        raise ValueError(f"import: {path}: {TABLE} does not hold the time features of this U-Net")
    return {"T": len(table), "ch": width, "num_class": 0 if label is None else len(label), "augm": "augm_embedding.weight" in tensors}


def theirs(name: str) -> str:
    """The released name of a tensor of `networks.UNet`."""
    for pattern, there in NAMES:
        name = re.sub(pattern, there, name)
    return name


def renamed(tensors: Mapping[str, Tensor], net: nn.Module, where: str) -> dict[str, Tensor]:
    """Their tensors under the names of `net`; every one must be there with its shape, and no other."""
    own = net.state_dict()
    there = {name: theirs(name) for name in own}
    shapes = [
        f"{there[name]} {tuple(tensors[there[name]].shape)} for {tuple(value.shape)}"
        for name, value in own.items()
        if there[name] in tensors and tensors[there[name]].shape != value.shape
    ]
    known = {TABLE, *there.values()}
    for what, found in (
        ("that are missing", [name for name in there.values() if name not in tensors]),
        ("that are none of this U-Net's", [name for name in tensors if name not in known]),
        ("of another shape", shapes),
    ):
        if found:
            raise ValueError(f"{where}: tensors {what} ({len(found)}): {', '.join(found[:3])}{', ..' if len(found) > 3 else ''}")
    return {name: tensors[there[name]] for name in own}


def moments(parts: Mapping, net: nn.Module, where: str) -> dict[int, dict]:
    """Adam's state by the number of the parameter here. Theirs are numbered as net_model's tensors, the constant table included."""
    try:
        state = {list(parts["net_model"])[number]: entry for number, entry in parts["optim"]["state"].items()}
        out = {}
        for number, (name, parameter) in enumerate(net.named_parameters()):
            out[number] = {key: state[theirs(name)][key] for key in ("step", "exp_avg", "exp_avg_sq")}
            if not out[number]["exp_avg"].shape == out[number]["exp_avg_sq"].shape == parameter.shape:
                raise ValueError(f"{where}: moments of {theirs(name)} must have its shape {tuple(parameter.shape)}")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected Adam's state of every parameter; {error!r}") from error
    return out


# ---- flags -----------------------------------------------------------------------------------------------------------


def read_flags(path: Path, known: Mapping[str, object]) -> dict[str, object]:
    """Those of absl's flags in `path` that are known, in the type of their defaults: lines --name=value, --name and --noname."""
    if not path.is_file():
        raise FileNotFoundError(f"import: no such file: {path}")
    out: dict[str, object] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(("#", "//")):
            continue
        match = re.fullmatch(r"--?(\w+)(?:=(.*))?", text)
        if match is None or match[1] == "flagfile":
            raise ValueError(f"import: {path}: line {number} must be a flag, --name=value; got {text!r}")
        name, value = match[1], match[2]
        if value is None and name not in known and name.startswith("no"):
            name, value = name[2:], "false"
        if name in known:
            out[name] = _converted(name, "true" if value is None else value, known[name], f"import: {path}: line {number}")
    return out


def _converted(name: str, text: str, default: object, where: str) -> object:
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "t", "f"):
            raise ValueError(f"{where}: {name} must be true or false; got {text!r}")
        return text.lower() in ("true", "1", "t")
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{where}: {name} must be {'a number' if kind is float else 'an integer'}; got {text!r}") from error


def settings_of(
    source: str, flags: Mapping[str, object], facts: Mapping[str, int | bool], dataset: str | None, **options: object
) -> tuple[str, ImageConfig, ImageConfig]:
    """(method, settings, the preset they start from) of a run with these flags; what has no flag is as the released code does it."""
    labels_dropped = flags["cfg"] or flags.get("cb", False)
    if dataset is None and flags["data_type"] not in DATA:
        raise ValueError(f"import: data_type must be one of {', '.join(DATA)}; got {flags['data_type']}: give --dataset")
    more: dict[str, object] = {}
    if source == "cbdm":
        method = "cbdm" if flags["cb"] and flags["conditional"] else "ddpm"
        more |= {"sampler": "ddpm", "sample_steps": facts["T"], "ddim_quirk": False}
        more |= {"cb_tau": flags["tau"], "cb_sampling": "uniform" if flags["finetune"] else "train"} if method == "cbdm" else {}
    else:
        method = "t2h" if flags["transfer_x0"] else "ddpm"
        more |= {"sample_steps": max(1, facts["T"] // 10)}  # every tenth
        more |= {"transfer_mode": flags["transfer_mode"]} if method == "t2h" else {}
        more |= {"transfer_beta": flags["tr_tau"]} if method == "t2h" and flags["transfer_tr_tau"] else {}
    if not labels_dropped:
        more |= {"omega": 0.0}  # there is no branch without labels to guide with
    preset = config.IMAGE_PRESETS[method]["code"]
    stated = {
        "dataset": dataset or DATA[flags["data_type"]], "imbalance_ratio": round(resolve_imbalance(imb_factor=flags["imb_factor"]), 9),
        "image_size": flags["img_size"], "timesteps": facts["T"], "beta_start": flags["beta_1"], "beta_end": flags["beta_T"],
        "variance": flags["var_type"], "network": "unet", "width": facts["ch"], "conditional": flags["conditional"],
        "dropout": flags["dropout"], "flip": "no" if flags["augm"] else "yes", "augment": "ada" if flags["augm"] else "none",
        "steps": flags["total_steps"], "batch_size": flags["batch_size"], "lr": flags["lr"], "warmup": flags["warmup"],
        "ema_decay": flags["ema_decay"], "clip": flags["grad_clip"], "cfg_drop": 0.1 if labels_dropped else 0.0,
        "samples": flags["num_images"], **more, **options,
    }  # fmt: skip
    kept = {item.name: getattr(preset, item.name) for item in dataclasses.fields(preset)}
    settings = config.from_mapping({**kept, **stated}, type(preset), where="the flags")
    return method, settings, preset
