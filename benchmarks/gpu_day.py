"""One command for a first day with a GPU: everything that only a card can tell, in one JSON file to send back.

    python benchmarks/gpu_day.py [--out FOLDER] [--steps NAME ...]
    python benchmarks/gpu_day.py --rehearse        # without a GPU: what needs a card is recorded as not run, the rest runs in small form

Steps: numerics-cuda, numerics-triton (the selftest), sanitizer (tests/gpu/compute_sanitizer.sh), tests (pytest -m gpu), benchmarks (cuda
and triton beside plain torch, steps of training), tune (the routes of this card, written into FOLDER and nowhere else).
FOLDER/report.json holds the machine, the versions and of each step its status, duration, end of output and results; it is replaced after
every step, and a step that fails or hangs does not stop the next. Steps that are run again replace their entries in it. The whole output
of a step is in FOLDER/<step>.log.

Exit status: 0 all steps passed (or could not run in a rehearsal), 1 one of them failed, 2 bad arguments, or no GPU and no --rehearse.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as for the steps, which run there

from ltkernels.selftest import driver  # noqa: E402

TAIL = 20_000  # characters of a step's output in the report


class Step(NamedTuple):
    command: list[str]
    rehearsal: list[str] | None  # the small form; None: needs a card
    minutes: float  # after which it counts as hanging
    result: str | None = None  # a JSON file in the folder that it leaves


def steps(out: Path) -> dict[str, Step]:
    selftest = [sys.executable, "-m", "ltkernels.selftest"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    cuda, triton = ([*selftest, "--json", str(out / f"{name}.json"), "--backend"] for name in ("cuda", "triton"))
    sanitizer = ["env", f"PYTHON={sys.executable}", "bash", "tests/gpu/compute_sanitizer.sh", str(out / "sanitizer")]
    benchmarks = [*pytest, "benchmarks", "--benchmark-only", "--benchmark-json", str(out / "benchmarks.json")]
    one_query = [*benchmarks, "-k", "50000 and ltkernels and not plain and not 4096"]
    tune = ["env", f"LTKERNELS_ROUTES={out / 'routes.json'}", *selftest, "--tune"]
    return {
        # a process each: an illegal access of one spoils every later call of its process
        "numerics-cuda": Step([*cuda, "cuda"], [*cuda, "reference"], 30, "cuda.json"),
        "numerics-triton": Step([*triton, "triton"], None, 30, "triton.json"),
        "sanitizer": Step(sanitizer, None, 240),
        "tests": Step([*pytest, "-m", "gpu", "tests"], None, 120),
        "benchmarks": Step([*benchmarks, "-m", "gpu"], one_query, 60, "benchmarks.json"),
        "tune": Step(tune, tune, 60, "routes.json"),
    }


def run(name: str, step: Step, out: Path, rehearse: bool) -> dict:
    """What the report says of one step."""
    command = step.rehearsal if rehearse else step.command
    if command is None:
        return {"status": "not run: no GPU"}
    if step.result:
        (out / step.result).unlink(missing_ok=True)  # of an earlier day
    log, start, code = out / f"{name}.log", time.monotonic(), None
    # a file, since a pipe could be held open; a group of its own, so that a step that hangs leaves nothing on the card
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return {"status": f"failed to start: {error}", "command": command}
        try:
            code = process.wait(60 * step.minutes)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.minutes} minutes"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for the driver may outlive this, too
                    process.wait(30)
    answer = {"status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 1), "command": command}
    answer["output_tail"] = log.read_text(errors="replace")[-TAIL:]
    if step.result and (out / step.result).is_file():
        try:
            answer["result"] = json.loads((out / step.result).read_text())
        except ValueError as error:
            answer["result"] = f"unreadable: {error}"
    return answer


def machine() -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("ltkernels", "triton", "numpy", "pytest"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if not torch.cuda.is_available():
        return {"device": None, "versions": versions}
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return {"device": torch.cuda.get_device_name(), "driver": driver(), "capability": capability, "versions": versions}


def write(path: Path, report: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def earlier(path: Path, rehearsal: bool) -> dict:
    """The steps of a report on this kind of machine that is already there."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    return report["steps"] if report["rehearsal"] == rehearsal else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-day"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--steps", nargs="+", choices=list(steps(Path())), metavar="NAME", help=f"only these of {', '.join(steps(Path()))}")
    parser.add_argument("--rehearse", action="store_true", help="try the command itself on a machine without a GPU")
    args = parser.parse_args(arguments)
    if torch.cuda.is_available() == args.rehearse:
        parser.error("there is a GPU: leave --rehearse out" if args.rehearse else "torch sees no GPU; --rehearse does what needs none")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = {"started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rehearsal": args.rehearse}
    report |= {"machine": machine(), "steps": earlier(out / "report.json", report["rehearsal"])}
    for name, step in steps(out).items():
        if args.steps and name not in args.steps:
            continue
        print(f"{name}: output in {out / name}.log ... ", end="", flush=True)
        report["steps"][name] = run(name, step, out, args.rehearse)
        write(out / "report.json", report)
        print(report["steps"][name]["status"], flush=True)
    print(f"send back {out / 'report.json'}")
    return 0 if all(step["status"] in ("passed", "not run: no GPU") for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
