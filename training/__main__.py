"""`python -m training <command>`, or `ltkernels <command>` where the package is installed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "dgd": "train DGD (density-gradient guided diffusion) and compare it with k-means and with the same run without guidance",
    "cludi": "train CLUDI (clustering by self-supervised diffusion) and compare it with eight other clusterings of the same features",
    "ddpm": "train an image diffusion model on a long tail, sample from it and evaluate the samples",
    "cbdm": "the same with class-balancing diffusion",
    "t2h": "the same with oriented calibration: noisy tail images may have head images as targets",
    "diffrop": "the same with overlap optimisation: denoised means of different classes are pushed apart, on top of ddpm or cbdm",
    "ccua": "the same with contrastive conditional-unconditional alignment",
    "analytic": "samples of the ideal denoiser of the training set, without training: the baseline of memorisation",
    "diffrc": "train DiffRC: images of rare classes from a guided diffusion model, and a classifier that learns from them",
    "zoo": "every method above on digits, each in its folder, and a line each of what came out",
    "sample": "more samples from a run of an image method (ddpm to analytic), finished or not",
    "evaluate": "score the samples of such runs, or anybody else's images",
    "classifier": "train the small classifier whose features stand in for Inception's; evaluate does it where it is missing",
    "figures": "tables and pictures over several seeds: figures dgd, cludi, t2h, diffrop, gda or diffrc",
    "features": "write a feature file of an image folder with a pretrained model of timm",
    "import": "a checkpoint of the released code of CBDM or T2H as a run folder",
    "fetch": "download Inception's weights or a data set for a machine without network",
    "cite": "BibTeX of a method's paper",
    "claims": "what the papers claim and where they are wrong, with the test or the figures behind each",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a wrong call, 130 (143) after SIGINT (SIGTERM)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ltkernels <command> [options], or python -m training <command> [options]\n")
        print("\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items()))
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _complain(f"ltkernels: the command must be one of {', '.join(COMMANDS)}; got {name!r}")
    try:
        return globals()[f"_{name}"](rest)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:  # of a command without checkpoints
        print(f"\n{name}: stopped", file=sys.stderr)
        return 130


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _dgd(arguments: list[str]) -> int:
    from . import run

    return _run("dgd", arguments, run.dgd)


def _cludi(arguments: list[str]) -> int:
    from . import run_cludi

    return _run("cludi", arguments, run_cludi.cludi)


def _ddpm(arguments: list[str]) -> int:
    return _images("ddpm", arguments)


def _cbdm(arguments: list[str]) -> int:
    return _images("cbdm", arguments)


def _t2h(arguments: list[str]) -> int:
    return _images("t2h", arguments)


def _diffrop(arguments: list[str]) -> int:
    return _images("diffrop", arguments)


def _ccua(arguments: list[str]) -> int:
    return _images("ccua", arguments)


def _analytic(arguments: list[str]) -> int:
    return _images("analytic", arguments)


def _images(name: str, arguments: list[str]) -> int:
    from . import run_images

    method = lambda settings, preset: run_images.images(name, settings, preset)  # noqa: E731
    return _run(name, arguments, method, run_images.SCORES)


def _diffrc(arguments: list[str]) -> int:
    from . import run_diffrc

    return _run("diffrc", arguments, run_diffrc.diffrc, run_diffrc.SCORES)


def _zoo(arguments: list[str]) -> int:
    from . import zoo

    return zoo.main(arguments)


def _sample(arguments: list[str]) -> int:
    from . import run_images

    return run_images.sample_main(arguments)


def _evaluate(arguments: list[str]) -> int:
    from . import evaluate

    return evaluate.main(arguments)


def _classifier(arguments: list[str]) -> int:
    from . import classifier

    return classifier.main(arguments)


def _run(name: str, arguments: list[str], method: Callable, columns: tuple[str, ...] | None = None) -> int:
    from . import config

    presets = config.PRESETS[name]
    settings, preset = parse(arguments, name, type(presets["default"]), presets)
    folder = config.run_folder(settings, name)
    return stoppable(lambda: _show(method(settings, preset), folder, columns), f"python -m training {name} --out {folder} --resume")


def _show(report: dict | None, folder, columns: tuple[str, ...] | None) -> None:
    from .runfolder import SCORES, table

    if report is None:  # of all ranks but the first, and of a run whose last stage is not asked for
        return
    print(table(report, columns or SCORES))
    if "reference" in report:
        print(f"features: {report['features']}; {report['n']} samples, guidance {report['guidance']:g}; reference: {report['reference']}")
    print(f"{report['dataset']}, {sum(report['counts'])} rows, {report['seconds']:.0f} s; everything else is in {folder}")


def stoppable(job: Callable[[], None], again: str) -> int:
    from .loop import Interrupted

    try:
        job()
    except Interrupted as stop:
        print(f"\n{stop}; its checkpoint is written. Go on with: {again}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"\nstopped between two stages; what was done is kept. Go on with: {again}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str], command: str, kind: type, presets: dict):
    """Options over a preset; with --resume over the settings of the run folder, so that nothing has to be said twice."""
    import tyro

    from . import config

    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default=None)
    chosen, rest = chooser.parse_known_args(arguments)
    name = chosen.preset or "default"
    if name not in presets:
        raise ValueError(f"{command}: --preset must be one of {', '.join(presets)}; got {name!r}")
    preset = presets[name]
    rest = [re.sub(r"^--data(?=$|=)", "--dataset", word) for word in rest]  # a shorter name for the option that is given most
    rest = imbalance_ratio(rest)
    text = f"{kind.__doc__}\n\nPresets: --preset {{{','.join(presets)}}}."
    settings = tyro.cli(kind, default=preset, args=rest, prog=f"python -m training {command}", description=text)
    refuse_unused_imbalance(settings, rest)
    stored = config.run_folder(settings, command) / "config.json"
    if settings.resume and stored.is_file() and chosen.preset is None:
        settings = tyro.cli(kind, default=config.read(stored, kind), args=rest, prog=f"python -m training {command}")
    return settings, preset


def refuse_unused_imbalance(settings, words: list[str]) -> None:
    from .data import makes_tail

    given = any(re.match(r"--imbalance[-_]ratio(=|$)", word) for word in words)
    if given and not makes_tail(settings.dataset, settings.indices):
        expected = "--imbalance-ratio is of the long tails that are made here: of names with -lt, without --indices"
        raise ValueError(f"dataset {settings.dataset}: {expected}; got {settings.imbalance_ratio:g}")


def imbalance_ratio(words: list[str]) -> list[str]:
    """--imb-factor f, as LDAM and CBDM have it, is --imbalance-ratio 1/f."""
    from .data import resolve_imbalance

    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--imb-factor=") else [word])]
    if "--imb-factor" not in words[:-1]:
        return words
    at = words.index("--imb-factor")
    if any(re.match(r"--imbalance[-_]ratio", word) for word in words):
        raise ValueError("imbalance: give --imbalance-ratio or --imb-factor, not both")
    try:
        ratio = resolve_imbalance(imb_factor=float(words[at + 1]))
    except ValueError as error:
        raise ValueError(f"--imb-factor: {error}") from error
    return [*words[:at], "--imbalance-ratio", repr(round(ratio, 9)), *words[at + 2 :]]


def _figures(arguments: list[str]) -> int:
    from . import figures

    return figures.main(arguments)


def _features(arguments: list[str]) -> int:
    from . import features

    return features.main(arguments)


def _import(arguments: list[str]) -> int:
    from . import released

    return released.main(arguments)


def _fetch(arguments: list[str]) -> int:
    from . import fetch

    return fetch.main(arguments)


def _cite(arguments: list[str]) -> int:
    from . import papers

    return papers.cite(arguments)


def _claims(arguments: list[str]) -> int:
    from . import papers

    return papers.claims(arguments)


if __name__ == "__main__":
    sys.exit(main())
