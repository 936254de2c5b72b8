"""What is said of the papers names tests and headings that exist; BibTeX; commands that need no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.__main__ import main
from training.claims import CLAIMS, VERDICTS
from training.papers import CITATIONS, NUMBERS, bibtex

ROOT = Path(__file__).parents[2]
EVIDENCE = sorted({where for claim in CLAIMS for where in claim.evidence})


def anchors(page):
    """GitHub's: lower case, punctuation gone, hyphens for spaces, a number for what occurs again."""
    seen, out = {}, set()
    for title in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        seen[name] = seen.get(name, -1) + 1
        out.add(f"{name}-{seen[name]}" if seen[name] else name)
    return out


def functions(file):
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("where", EVIDENCE)
def test_evidence_exists(where):
    file, test = re.fullmatch(r"([\w./-]+\.(?:py|md))(?:::(test_\w+)|#[\w-]+)", where).groups()
    assert (ROOT / file).is_file()
    assert test in functions(file) if test else where.partition("#")[2] in anchors(file)


def test_every_claim_is_complete():
    assert len({(claim.method, claim.where, claim.says, claim.here) for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.method in NUMBERS and claim.verdict in VERDICTS and claim.where and (claim.says or claim.here) and claim.evidence
        assert (claim.here == "") == (claim.verdict == "not run"), claim
        if claim.verdict == "not run":  # nothing that was not run has figures behind it
            assert all("::" not in where for where in claim.evidence)


@pytest.mark.parametrize(("method", "letter", "count"), [("t2h", "D", 13), ("diffrop", "R", 15), ("diffrc", "C", 10), ("cludi", "L", 14)])
def test_every_numbered_point_of_the_readme_is_told(method, letter, count):
    """Each D, R, C or L of the methods' pages is in the table, but what a list of differences between code and code has."""
    told = " ".join(claim.where for claim in CLAIMS if claim.method == method)
    ranges = {(a, int(i)) for a, start, end in re.findall(r"\b([A-Z])(\d+) to [A-Z]?(\d+)", told) for i in range(int(start), int(end) + 1)}
    named = {(a, int(i)) for a, i in re.findall(r"\b([A-Z])(\d+)", told)} | ranges
    missing = {number for number in range(1, count + 1) if (letter, number) not in named}
    assert missing <= {"t2h": {6, 13}, "diffrop": {9, 14}}.get(method, set())  # options, and bugs of the released code


def test_commands(capsys):
    assert main(["claims", "diffrc", "--verdict", "wrong"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("003 diffrc: 8 wrong") and "Eq. 13 (C5)" in out and "001" not in out
    assert "- tests/training/test_diffrc.py::test_one_step_moves_the_loss_as_the_sign_says" in out
    assert main(["claims"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{number} {name}: " in f"\n{out}" for name, number in NUMBERS.items())
    assert main(["claims", "ddpm"]) == 2
    assert "claims: expected one of dgd, t2h, diffrop, diffrc, cludi; got 'ddpm'" in capsys.readouterr().err
    assert main(["cite", "cbdm", "ddpm"]) == 0
    out = capsys.readouterr().out
    assert "@inproceedings{qin2023cbdm," in out and "pages        = {6840--6851}," in out
    assert main(["cite", "gan"]) == 2 and "cite: expected one of dgd," in capsys.readouterr().err


@pytest.mark.parametrize("method", CITATIONS)
def test_bibtex_is_well_formed(method):
    text = bibtex(method)
    assert text.count("{") == text.count("}") and re.match(r"@(article|inproceedings|misc)\{[\w-]+,\n", text) and text.endswith("\n}")
    assert "title        = {" in text and set(CITATIONS) >= {*NUMBERS, "cbdm", "ddpm", "ltkernels"}
    assert all(re.fullmatch(r"  \w+ += \{.+\},", line) for line in text.splitlines()[1:-1])


def test_what_needs_no_torch_loads_none():
    code = "import sys; from training.__main__ import main; main(['cite', 't2h']); main(['claims', 't2h']); main(['--help'])"
    code += "; sys.exit(bool({'torch', 'numpy', 'tyro', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "@misc{zhang-t2h" in done.stdout, done.stderr
