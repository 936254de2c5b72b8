"""What the README files show runs: their Python blocks, and the commands as far as their options."""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import training.__main__
from training.methods import DiffROP

ROOT = Path(__file__).parents[1]
PAGES = [str(page.relative_to(ROOT)) for page in sorted(ROOT.rglob("README.md")) if not {"build", "runs"} & set(page.parts)]


def blocks(language):
    return [
        (page, block) for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ]  # fmt: skip


LOOPS = [block for page, block in blocks("python") if page == "README.md" and "optimizer.step()" in block]
OTHERS = [(page, block) for page, block in blocks("python") if block not in LOOPS]
COMMANDS = [
    line.split("#")[0].strip() for _, block in [*blocks("sh"), *blocks("bash")] for line in block.splitlines()
    if re.match(r"(python -m training|ltkernels) ", line)
]  # fmt: skip


def run(block, **names):
    """A checkout has the package ltkernels.training as training."""
    exec(compile(block.replace("ltkernels.training", "training"), "README.md", "exec"), names)


@pytest.mark.parametrize("page, block", OTHERS, ids=[page for page, _ in OTHERS])
def test_code_block_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


@pytest.mark.parametrize("block", LOOPS, ids=["ddpm", "diffusers", "edm", "flow"])
def test_a_foreign_loop_learns(block, tmp_path, monkeypatch):
    """50 steps, after which the network answers T2H's targets by a fifth better than at first; DiffROP's term is there all along."""
    assert len(block.strip().splitlines()) <= 25 and "t2h.target(" in block and "diffrop.loss(" in block
    monkeypatch.chdir(tmp_path)
    terms, losses, real = [], [], DiffROP.loss
    monkeypatch.setattr(DiffROP, "loss", lambda *args: terms.append(real(*args)) or terms[-1])
    block = block.replace("optimizer.step()", "optimizer.step(), seen(loss)")
    torch.manual_seed(0)
    run(block, seen=lambda loss: losses.append(loss.item()))
    errors = torch.tensor(losses) - torch.stack(terms).detach()
    assert len(losses) == len(terms) == 50
    assert min(term.item() for term in terms) > 0
    assert errors[-10:].mean() < 0.8 * errors[:10].mean()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    """Files, and headings of pages by the anchors that GitHub gives them."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_the_pictures_of_the_ops_are_drawn_anew(tmp_path):
    spec = importlib.util.spec_from_file_location("draw_ops", ROOT / "benchmarks/draw_ops.py")
    draw_ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_ops)
    draw_ops.main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "ltkernels").glob("*.png")) == ["density.png", "pcl_forms.png", "selection.png"]
    assert all(1e4 < path.stat().st_size < 2e5 for path in tmp_path.iterdir())


class Parsed(Exception):
    pass


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_the_options_they_are_shown_with(line, tmp_path, monkeypatch, capsys):
    words = shlex.split(line)
    words = words[1:] if words[0] == "ltkernels" else words[3:]
    monkeypatch.chdir(tmp_path)
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **rest):
        real(parser, *args, **rest)
        raise Parsed

    if words[0] not in ("cite", "claims"):  # these only print
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(training.__main__, "stoppable", lambda job, again: 0)
    try:
        code = training.__main__.main(words)
    except Parsed:
        code = 0
    assert code == 0, capsys.readouterr().err


def test_a_command_with_an_unknown_option_is_found(tmp_path, monkeypatch, capsys):
    for wrong in ("ddpm --stepz 3", "evaluate --sampels x.npy", "t2h --preset tabel1-j", "figures t2h --parts tabel"):
        with pytest.raises((SystemExit, AssertionError)):
            test_commands_have_the_options_they_are_shown_with(f"ltkernels {wrong}", tmp_path, monkeypatch, capsys)
