"""The selftest finds what is wrong, --tune writes what `choose` obeys, and the tools for a day with a GPU work without one."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ltkernels
from ltkernels import backends, selftest

ROOT = Path(__file__).parents[1]
CPU = "cpu" if ltkernels.build_info()["cpp"] else "reference"  # the backend that the tests break
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def routes(tmp_path, monkeypatch):
    """The routes file is in tmp_path, nothing that was read from another one is remembered, and torch has its threads afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("LTKERNELS_ROUTES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    forget()
    yield tmp_path / "config" / "ltkernels" / "routes.json"
    forget()
    torch.set_num_threads(threads)


def forget():
    backends.read_routes.cache_clear()
    backends._preferred.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- the table


OUTPUTS = {
    "knn": {"sqdist", "set", "order"}, "knn_kde_grad": {"sqdist", "set", "order", "log_density", "score", "truncation"},
    "p_sel": {"p"}, "score_select": {"index", "log_normalizer"}, "posterior_mean": {"mean"},
    "pairwise_sqdist": {"sqdist"}, "pcl_loss": {"loss", "mu grad", "other grad", "weight grad", "margin grad"},
}  # fmt: skip


def test_this_machine(tmp_path, capsys):
    assert selftest.main(["--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    running, missing = selftest.places(None, None)
    assert ("reference", "cpu") in running and (CPU, "cpu") in running
    for name, device in running:
        for op in selftest.OPS:
            dtypes = ["float16", "bfloat16", "float32", *(["float64"] if name in ("cpu", "reference") else [])]
            rows = [row for row in report["rows"] if (row["backend"], row["device"], row["op"]) == (name, device, op)]
            assert [row["dtype"] for row in rows] == dtypes
            for row in rows:
                assert row["verdict"] == "ok" and row["cases"] >= 15
                assert {"bits", *OUTPUTS[op]} <= set(row["worst"])
                assert re.search(rf"^{name} +{device} +{op} +{row['dtype']} .* ok$", printed, re.MULTILINE)
    assert {name for name, _ in running} | {place.split(" on ")[0] for place in missing} == set(backends.BACKENDS)
    assert report["not tested"] == missing
    for place, reason in missing.items():
        assert reason and f"not tested: {place}: {reason}" in printed
    assert torch.__version__ in report["facts"]["ltkernels"] and report["facts"]["C++ kernels"]


def test_every_op_is_in_the_table():
    assert set(selftest.OPS) == {backends._PUBLIC_NAMES[schema.split("(")[0]] for schema in backends.SCHEMAS}


LEFT_OUT = "NaN and inf", selftest._searches  # the selections keep theirs


@pytest.fixture
def few_cases(monkeypatch):
    """Three cases and one dtype, for what does not depend on them."""
    names = {"gaussian d=33 k=1", "lattice", "leave one out", "ragged", "log_prior", "other", "NaN and inf"}
    monkeypatch.setattr(backends, "_FLOATS", (torch.float32,))

    def few(cases):
        return lambda dtype: {name: case for name, case in cases(dtype).items() if name in names and (name, cases) != LEFT_OUT}

    for op, entry in selftest.OPS.items():
        monkeypatch.setitem(selftest.OPS, op, entry._replace(cases=few(entry.cases)))


def perturb(monkeypatch, op, change):
    """Put change(answer, arguments) in place of an op's answer."""
    implementation = backends.implementation

    def perturbed(name, backend):
        run = implementation(name, backend)
        return (lambda *arguments: tuple(change([x.clone() for x in run(*arguments)], arguments))) if name == op else run

    monkeypatch.setattr(backends, "implementation", perturbed)


def wrong_density(answer, _):
    answer[0] += 1e-3
    return answer


def no_density(answer, _):
    answer[0][:1] = float("nan")
    return answer


def scaled_score(answer, _):
    answer[1][:, 0] *= 1.001
    return answer


def another_neighbour(answer, arguments):
    index, n = answer[3], len(arguments[1])
    if len(index):
        index[0, -1] = next(row for row in range(n) if row not in index[0])
    return answer


def swapped_neighbours(answer, _):
    for x in answer[2:4]:
        x[:, :2] = x[:, :2].flip(1)
    return answer


def wrong_distance(answer, _):
    answer[2] *= 1 + 1e-5
    return answer


def from_another_call(answer, _):
    answer[0] *= 1 + 1e-6 * torch.rand(())
    return answer


@pytest.mark.parametrize(
    "change, output",
    [
        (wrong_density, "log_density"), (no_density, "log_density"), (scaled_score, "score"), (another_neighbour, "sqdist"),
        (swapped_neighbours, "order"), (wrong_distance, "sqdist"), (from_another_call, "bits"),
    ],  # fmt: skip
)
def test_a_wrong_answer_is_a_miss(change, output, few_cases, monkeypatch, capsys, tmp_path):
    perturb(monkeypatch, "knn_kde_bounded", change)
    assert selftest.main(["--backend", CPU, "--json", str(tmp_path / "report.json")]) == 1
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["op"] for row in rows if row["verdict"] == "ok"} == set(selftest.OPS) - {"knn_kde_grad"}
    assert {row["op"] for row in rows if row["verdict"] != "ok"} == {"knn_kde_grad"}
    assert all(f"{output} in " in row["verdict"] for row in rows if row["verdict"] != "ok")
    assert re.search(rf"^{CPU} .* knn_kde_grad +float32 .* MISS: .*{output} in ", capsys.readouterr().out, re.MULTILINE)


def scaled_p(answer, _):
    answer[0] *= 1.003
    return answer


def wrong_normaliser(answer, _):
    answer[2] += 2e-3
    return answer


def another_sample(answer, arguments):
    answer[0][:1] = (answer[0][:1] + 1) % len(arguments[1])
    return answer


def no_refusal(answer, _):
    answer[0].clamp_(min=0)
    return answer


@pytest.mark.parametrize(
    "op, change, output",
    [
        ("psel", scaled_p, "p"), ("psel", from_another_call, "bits"), ("score_select", wrong_normaliser, "log_normalizer"),
        ("score_select", another_sample, "index"), ("score_select", no_refusal, "index"),
    ],  # fmt: skip
)
def test_a_wrong_selection_is_a_miss(op, change, output, few_cases, monkeypatch):
    perturb(monkeypatch, op, change)
    public = backends._PUBLIC_NAMES.get(op, op)
    assert f"{output} in " in selftest.test(CPU, "cpu", public, torch.float32)["verdict"]
    assert selftest.test(CPU, "cpu", "knn", torch.float32)["verdict"] == "ok"


def test_a_wrong_mean_is_a_miss(few_cases, monkeypatch):
    perturb(monkeypatch, "psel_mean", lambda answer, _: (answer[0] + 2e-3, answer[1]))
    assert "mean in " in selftest.test(CPU, "cpu", "posterior_mean", torch.float32)["verdict"]
    assert selftest.test(CPU, "cpu", "p_sel", torch.float32)["verdict"] == "ok"


def scaled_distance(answer):
    return answer * (1 + 1e-5)


def lost_nan(answer):
    return answer.nan_to_num()


def one_sided(answer):
    answer[:1, 1:] *= 1 + 2e-7
    return answer


@pytest.mark.parametrize("change, output", [(scaled_distance, "sqdist"), (lost_nan, "sqdist"), (one_sided, "bits")])
def test_a_wrong_distance_of_a_pair_is_a_miss(change, output, few_cases, monkeypatch):
    implementation = backends.implementation

    def changed(name, backend):
        run = implementation(name, backend)
        return (lambda *arguments: change(run(*arguments).clone())) if name == "pair_sqdist" else run

    monkeypatch.setattr(backends, "implementation", changed)
    assert f"{output} in " in selftest.test(CPU, "cpu", "pairwise_sqdist", torch.float32)["verdict"]
    assert selftest.test(CPU, "cpu", "pcl_loss", torch.float32)["verdict"] == "ok"


def wrong_total(answer, _):
    answer[0] *= 1 + 1e-5
    return answer


def wrong_row(answer, _):
    answer[2] *= 1 + 1e-5
    return answer


def another_divisor(answer, _):
    answer[1] += 1
    return answer


def another_active_pair(answer, _):
    answer[3][:1] += 1
    return answer


def turned_gradient(answer, _):
    answer[4][:1] *= -1
    return answer


def one_gradient_less(answer, _):
    answer[5][1:2] = 0
    return answer


def no_broken_gradient(answer, _):
    answer[4].nan_to_num_()
    return answer


@pytest.mark.parametrize(
    "change, output",
    [
        (wrong_total, "loss"), (wrong_row, "weight grad"), (another_divisor, "mu grad"), (another_active_pair, "margin grad"),
        (turned_gradient, "mu grad"), (one_gradient_less, "other grad"), (no_broken_gradient, "mu grad"), (from_another_call, "bits"),
    ],  # fmt: skip
)
def test_a_wrong_loss_is_a_miss(change, output, few_cases, monkeypatch):
    perturb(monkeypatch, "pcl", change)
    assert f"{output} in " in selftest.test(CPU, "cpu", "pcl_loss", torch.float32)["verdict"]
    assert selftest.test(CPU, "cpu", "pairwise_sqdist", torch.float32)["verdict"] == "ok"


def test_a_nearer_point_left_out_is_a_miss(few_cases, monkeypatch):
    implementation = backends.implementation

    def second_best(name, backend):
        run = implementation(name, backend)
        return lambda *arguments: tuple(x[:, 1:].contiguous() for x in run(*arguments[:7], arguments[7] + 1))

    monkeypatch.setattr(backends, "implementation", second_best)
    row = selftest.test(CPU, "cpu", "knn", torch.float32)
    assert row["verdict"].startswith("MISS: set in ")


def test_lost_rows_in_place_of_neighbours_are_a_miss(monkeypatch):
    """Rows with NaN are infinitely far, and answered only where there are no others."""
    implementation = backends.implementation
    cases = selftest.OPS["knn"].cases(torch.float32)
    broken = {"NaN and inf": cases["NaN and inf"]}
    monkeypatch.setitem(selftest.OPS, "knn", selftest.OPS["knn"]._replace(cases=lambda dtype: broken))

    def lost(name, backend):
        def run(queries, points, *rest):
            sqdist, index = implementation(name, backend)(queries, points, *rest)
            gone = (~torch.isfinite(points).all(1)).nonzero().flatten()[:3]
            sqdist[:, -3:], index[:, -3:] = sqdist[:, -3:].clamp(min=torch.inf), gone
            return sqdist, index

        return run

    assert selftest.test(CPU, "cpu", "knn", torch.float32)["verdict"] == "ok"
    monkeypatch.setattr(backends, "implementation", lost)
    assert selftest.test(CPU, "cpu", "knn", torch.float32)["verdict"].startswith("MISS: set in ")


def test_a_bound_that_is_exceeded_is_a_miss(few_cases, monkeypatch):
    perturb(monkeypatch, "knn_kde_bounded", lambda answer, _: (*answer[:4], torch.full_like(answer[4], -30.0)))
    assert "truncation in " in selftest.test(CPU, "cpu", "knn_kde_grad", torch.float32)["verdict"]


def test_an_op_that_raises_hides_no_other_row(few_cases, monkeypatch, capsys):
    def broken(answer, _):
        raise RuntimeError("CUDA error: an illegal memory access\nand many more lines")

    perturb(monkeypatch, "knn", broken)
    assert selftest.main(["--backend", CPU]) == 1
    printed = capsys.readouterr().out
    assert re.search(r" knn +float32 .*MISS: gaussian d=33 k=1: RuntimeError: CUDA error: an illegal memory access$", printed, re.MULTILINE)
    assert re.search(r" knn_kde_grad +float32 .*ok$", printed, re.MULTILINE)
    assert f"{2 * len(selftest.OPS) - 2} of {2 * len(selftest.OPS)} rows are ok" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--backend", "cuda"], "nothing can run: cuda on cuda: .*torch sees no GPU"),
        (["--device", "cuda"], "nothing can run: .*triton on cuda: "),
        (["--backend", "cpu", "--device", "cuda"], "nothing can run: no such pair"),
        (["--json", "nowhere/report.json"], "--json: no such folder: .*nowhere"),
    ],
)
def test_wrong_arguments(arguments, message, no_gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        selftest.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_cases_reach_every_rung_of_cuda(monkeypatch):
    """tests/simt runs the CUDA source on the CPU and counts the queries that took the second rung and the exact one."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "simt"))
    import knn_kde
    import simt_host

    if simt_host.missing():
        pytest.skip(simt_host.missing())
    library = simt_host.load(simt_host.build(knn_kde.ENTRY))
    cases = selftest._searches(torch.float32)
    rungs = {"gaussian d=32 k=256": (0, 0), "clusters": (1, 0), "tight clusters": (1, 1), "duplicates": (1, 1)}
    for name, expected in (rungs | {"squares near overflow": (1, 1)}).items():
        case = cases[name]
        queries, points = case.queries[:2].contiguous().numpy(), case.points.numpy()
        answer = knn_kde.solve(library, queries, points, case.k, bandwidth=case.bandwidth, multiprocessors=132)
        assert tuple(answer.paths // 2) == expected, name


INTERPRET = """
import torch
from ltkernels import selftest
from ltkernels.triton import knn_kde
made, make = [], knn_kde._workspace
knn_kde._workspace = lambda *arguments: made.append(make(*arguments)) or made[-1]
cases = selftest._searches(torch.float32)
for name in ("gaussian d=33 k=1", "duplicates"):
    made.clear()
    selftest.OPS["knn_kde_grad"] = selftest.OPS["knn_kde_grad"]._replace(cases=lambda dtype: {name: cases[name]})
    row = selftest.test("triton", "cpu", "knn_kde_grad", torch.float32)
    print(name, row["verdict"], [int(space.exact_count) for space in made])
print(selftest.places("cpu", "triton"), selftest.facts()["triton"])
"""


def test_interpreted_triton_and_its_rungs():
    pytest.importorskip("triton")
    environment = {**WITHOUT_GPU, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRET], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "gaussian d=33 k=1 ok [0, 0, 0, 0]" in run.stdout and "duplicates ok [3, 3, 2, 1]" in run.stdout
    assert "([('triton', 'cpu')], {}) interpreted: every case has fewer and shorter rows" in run.stdout


# ---- routes


def test_nothing_to_choose_between(no_gpu, routes, capsys):
    assert selftest.main(["--tune"]) == 0
    assert capsys.readouterr().out == "--tune: nothing to choose between: of cuda and triton, none can run here\n"
    assert not routes.exists()


@pytest.fixture
def card(monkeypatch):
    """A machine with a card, as far as the choice of a backend can tell: name and times can be set."""
    state = SimpleNamespace(name="NVIDIA Test 100", seconds=lambda op, dtype, d, k: {"cuda": 2.0 if d > 128 else 0.8, "triton": 1.0})

    def measure(op, dtype, d, k, rivals):
        return {name: [9.0, state.seconds(op, dtype, d, k)[name], 0.1] for name in rivals}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: state.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    monkeypatch.setattr(selftest, "places", lambda device, name: ([("cuda", "cuda"), ("triton", "cuda"), ("cpu", "cpu")], {}))
    monkeypatch.setattr(selftest, "test", lambda name, device, op, dtype: {"backend": name, "verdict": "ok"})
    monkeypatch.setattr(selftest, "measure", measure)
    return state


def chosen(d, k=16, op="knn", dtype=torch.float32):
    like = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0), shape=(5, d), dtype=dtype)
    return backends.choose(op, like, 1000, k)


def test_tuned_routes_are_obeyed(card, routes, capsys):
    assert chosen(d=32) == "triton"  # as the unmeasured table has it
    assert selftest.main(["--tune"]) == 0
    assert f"99 rows for NVIDIA Test 100 in {routes}" in capsys.readouterr().out
    rows = json.loads(routes.read_text())["rows"]
    assert rows[0] == {
        "device": "NVIDIA Test 100", "op": "knn", "dtypes": ["float16"], "d": [1, 64], "k": [1, 32], "backend": "cuda",
        "reason": "measured on NVIDIA Test 100: cuda 0.80 of triton's time, median of 7",
    }  # fmt: skip
    for op in selftest.OPS:
        assert [chosen(d, op=op) for d in (1, 64, 65, 256, 257, 4096)] == ["cuda"] * 4 + ["triton"] * 2
        assert [chosen(20, k, op, torch.bfloat16) for k in (1, 32, 33, 256)] == ["cuda"] * 4
    card.name = "NVIDIA Test 200"
    assert chosen(d=32) == "triton"  # not its card


def test_routes_that_cannot_be_written_are_found_before_anything_is_measured(card, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LTKERNELS_ROUTES", str(tmp_path / "file" / "routes.json"))
    monkeypatch.setattr(selftest, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        selftest.main(["--tune"])
    assert stop.value.code == 2 and "--tune: " in capsys.readouterr().err


def test_tuning_replaces_the_rows_of_one_card(card, routes):
    assert selftest.main(["--tune"]) == 0
    card.name, card.seconds = "NVIDIA Test 200", lambda op, dtype, d, k: {"cuda": 1.0, "triton": 1.5 if op == "knn" else 0.5}
    assert selftest.main(["--tune"]) == 0
    assert chosen(d=512) == "cuda" and chosen(d=512, op="knn_kde_grad") == "triton"
    card.name = "NVIDIA Test 100"
    assert chosen(d=512) == "triton" and chosen(d=32, op="knn_kde_grad") == "cuda"
    card.seconds = lambda op, dtype, d, k: {"cuda": 1.0, "triton": 2.0}
    assert selftest.main(["--tune"]) == 0
    assert chosen(d=512) == "cuda" and len(json.loads(routes.read_text())["rows"]) == 198


def test_what_cannot_be_timed_keeps_the_unmeasured_route(card, routes, capsys):
    def seconds(op, dtype, d, k):
        if d == 512:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"cuda": 1.0, "triton": 2.0}

    card.seconds = seconds
    assert selftest.main(["--tune"]) == 1
    assert "knn torch.float16 d=512 k=16: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    assert chosen(d=32) == "cuda" and chosen(d=512) == "triton"


def test_a_backend_that_is_wrong_is_not_timed(card, routes, monkeypatch):
    verdicts = {"cuda": "MISS: bits in lattice", "triton": "ok"}
    monkeypatch.setattr(selftest, "test", lambda name, *_: {"backend": name, "verdict": verdicts[name]})
    assert selftest.main(["--tune"]) == 1
    assert not routes.exists()


def test_rivals_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    workload = lambda dtype, d, k: lambda: calls.append(backends._requested.get())  # noqa: E731
    monkeypatch.setitem(selftest.OPS, "knn", selftest.OPS["knn"]._replace(workload=workload))
    times = selftest.measure("knn", torch.float32, 32, 16, ["cuda", "triton"])
    assert calls == ["synchronize", "cuda", "synchronize", "synchronize", "triton", "synchronize"] * (selftest.WARMUP + selftest.ROUNDS)
    assert [len(times[name]) for name in ("cuda", "triton")] == [selftest.ROUNDS] * 2


ROW = {"device": "NVIDIA Test 100", "op": "knn", "dtypes": ["float32"], "d": [1, 64], "k": [1, 32], "backend": "cuda", "reason": "measured"}
BROKEN = {
    "no JSON": ("rows: []", "Expecting value"),
    "not text": ("\udcff", "invalid start byte|can't decode"),
    "no rows": ('{"row": []}', r'expected {"rows": \[...\]}'),
    "a list": ("[]", r'expected {"rows": \[...\]}'),
    "a row that is none": ({"rows": [3]}, "in 3: expected dtypes as a list .*; got None"),
    "unknown backend": (ROW | {"backend": "gpu"}, "expected backend as cuda or triton; got 'gpu'"),
    "a backend for CPU tensors": (ROW | {"backend": "cpu"}, "expected backend as cuda or triton; got 'cpu'"),
    "unknown op": (ROW | {"op": "knn_kde"}, f"expected op as one of {', '.join(selftest.OPS)}; got 'knn_kde'"),
    "unknown dtype": (ROW | {"dtypes": ["float64"]}, r"expected dtypes as a list out of float16, .*; got \['float64'\]"),
    "dtype without a list": (ROW | {"dtypes": "float32"}, "expected dtypes as a list .*; got 'float32'"),
    "empty range": (ROW | {"d": [64, 1]}, r"expected d as \[first, last\] with 1 <= first <= last; got \[64, 1\]"),
    "one number for a range": (ROW | {"k": 16}, r"expected k as \[first, last\] .*; got 16"),
    "no device": ({key: value for key, value in ROW.items() if key != "device"}, "expected device as the name of a card; got None"),
    "no reason": (ROW | {"reason": None}, "expected reason as text; got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_routes_file(name, card, routes, capsys):
    content, defect = BROKEN[name]
    if isinstance(content, dict):
        content = json.dumps(content if "rows" in content else {"rows": [ROW, content]})
    routes.parent.mkdir(parents=True)
    routes.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(routes))}: .*({defect}).*; correct or remove the file$"):
        chosen(d=32)
    with pytest.raises(SystemExit) as stopped:
        selftest.main(["--tune"])
    assert stopped.value.code == 2 and str(routes) in capsys.readouterr().err
    with ltkernels.backend("triton"):
        assert chosen(d=32) == "triton"  # who names a backend does not need the file


def test_a_routes_file_that_is_named(card, monkeypatch, tmp_path):
    named = tmp_path / "folder" / "named.json"
    monkeypatch.setenv("LTKERNELS_ROUTES", str(named))
    with pytest.raises(ValueError, match="LTKERNELS_ROUTES: no such file: .*named.json; `python -m ltkernels.selftest --tune` writes it"):
        chosen(d=32)
    assert selftest.main(["--tune"]) == 0
    assert named.exists() and chosen(d=32) == "cuda"


@pytest.mark.gpu
def test_tune_on_this_card(monkeypatch, routes):
    running, _ = selftest.places("cuda", None)
    monkeypatch.setattr(selftest, "TUNED_D", {32: range(1, 4097)})
    monkeypatch.setattr(selftest, "TUNED_K", {16: range(1, 257)})
    assert selftest.main(["--tune"]) == 0
    assert routes.exists() == (len(running) == 2)
    for route in backends.read_routes(routes) if routes.exists() else []:
        assert chosen(100, 100, route.op, route.dtypes[0]) == route.backend and route.device == torch.cuda.get_device_name()


# ---- compute-sanitizer


def sanitize(tmp_path, tools: str | None):
    """The script with nothing but its own programs on PATH, and a compute-sanitizer that does `tools`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "grep", "mkdir", "realpath"):
        (programs / name).symlink_to(shutil.which(name))
    if tools is not None:
        notes = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>"{tmp_path}/calls"'
        (programs / "compute-sanitizer").write_text(f"#!{programs}/bash\n{notes}\n{tools}")
        (programs / "compute-sanitizer").chmod(0o755)
    environment = {"PATH": str(programs), "PYTHON": "the-python"}
    script = [programs / "bash", ROOT / "tests" / "gpu" / "compute_sanitizer.sh", tmp_path / "logs"]
    return subprocess.run(script, env=environment, capture_output=True, text=True)


CLEAN = 'if [ "$2" = racecheck ]; then echo "= RACECHECK SUMMARY: 0 hazards displayed"; else echo "= ERROR SUMMARY: 0 errors"; fi\n'


def test_sanitizer_that_finds_nothing(tmp_path):
    run = sanitize(tmp_path, CLEAN)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split("\n")[:-1] == ["memcheck: clean", "racecheck: clean", "synccheck: clean", "initcheck: clean"]
    for call in (tmp_path / "calls").read_text().splitlines():
        assert re.fullmatch(r"1 --tool \w+ --error-exitcode 1 .*the-python -m ltkernels.selftest --device cuda --backend cuda", call)
    assert len(list((tmp_path / "logs").glob("*.log"))) == 4


@pytest.mark.parametrize(
    "finding",
    [
        'echo "= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 1',
        'echo "= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"; exit 0',  # warnings leave the status alone
        'echo "cuda knn float32 MISS: bits in lattice"; echo "= RACECHECK SUMMARY: 0 hazards displayed"; exit 1',
        "exit 0",  # it did not attach
    ],
)
def test_sanitizer_that_finds_something(tmp_path, finding):
    run = sanitize(tmp_path, f'if [ "$2" = racecheck ]; then {finding}; fi\n{CLEAN}')
    assert run.returncode == 1
    assert "racecheck: FAILED" in run.stdout and run.stdout.count(": clean") == 3, "the other tools run all the same"


def test_sanitizer_that_is_not_installed(tmp_path):
    run = sanitize(tmp_path, None)
    assert run.returncode == 127 and "comes with the CUDA toolkit" in run.stderr and "pip install" in run.stderr


# ---- a day with a GPU


@pytest.fixture
def gpu_day(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_day", ROOT / "benchmarks" / "gpu_day.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rehearsal(tmp_path):
    command = [sys.executable, "benchmarks/gpu_day.py", "--rehearse", "--out", tmp_path]
    command += ["--steps", "numerics-cuda", "sanitizer", "tests", "tune"]
    run = subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rehearsal"] and report["machine"]["device"] is None and report["machine"]["versions"]["torch"] == torch.__version__
    steps = report["steps"]
    assert [steps[name]["status"] for name in steps] == ["passed", "not run: no GPU", "not run: no GPU", "passed"]
    assert all(row["verdict"] == "ok" for row in steps["numerics-cuda"]["result"]["rows"]) and steps["numerics-cuda"]["seconds"] > 0
    assert "nothing to choose between" in steps["tune"]["output_tail"]
    assert f"send back {tmp_path / 'report.json'}" in run.stdout


def test_a_step_run_again_keeps_the_others(gpu_day, no_gpu, tmp_path):
    assert gpu_day.main(["--rehearse", "--out", str(tmp_path), "--steps", "tests"]) == 0
    assert gpu_day.main(["--rehearse", "--out", str(tmp_path), "--steps", "sanitizer"]) == 0
    assert set(json.loads((tmp_path / "report.json").read_text())["steps"]) == {"tests", "sanitizer"}


def test_benchmarks_of_the_rehearsal_exist(gpu_day, tmp_path):
    command = gpu_day.steps(tmp_path)["benchmarks"].rehearsal
    run = subprocess.run([*command, "--collect-only"], cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)
    assert run.returncode == 0 and "1/" in run.stdout.splitlines()[-1], run.stdout + run.stderr


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(gpu_day, no_gpu, monkeypatch, tmp_path):
    def python(code, minutes=1.0, result=None):
        return gpu_day.Step([], [sys.executable, "-c", code], minutes, result)

    written = f"open({str(tmp_path / 'result.json')!r}, 'w').write"
    plan = {
        "fails": python("print('before'); raise SystemExit(3)"),
        "hangs": python("import signal; signal.pause()", minutes=0.0),
        "cannot start": gpu_day.Step([], [str(tmp_path / "no-such-program")], 1.0),
        "breaks its result": python(f"{written}('{{')", result="result.json"),
        "leaves no result": python("pass", result="result.json"),
        "passes": python(f"{written}('[1]')", result="result.json"),
        "needs a card": gpu_day.Step([], None, 1.0),
    }
    monkeypatch.setattr(gpu_day, "steps", lambda out: plan)
    seen = []
    write = gpu_day.write
    monkeypatch.setattr(gpu_day, "write", lambda path, report: (write(path, report), seen.append(json.loads(path.read_text()))))
    assert gpu_day.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert [list(report["steps"]) for report in seen] == [list(plan)[: i + 1] for i in range(len(plan))]
    steps = seen[-1]["steps"]
    assert steps["fails"]["status"] == "failed" and steps["fails"]["exit_code"] == 3 and steps["fails"]["output_tail"] == "before\n"
    assert steps["hangs"]["status"] == "stopped after 0.0 minutes" and steps["hangs"]["exit_code"] is None
    assert steps["cannot start"]["status"].startswith("failed to start: ") and "no-such-program" in steps["cannot start"]["status"]
    assert steps["breaks its result"]["result"].startswith("unreadable: ") and "result" not in steps["leaves no result"]
    assert steps["passes"]["status"] == "passed" and steps["passes"]["result"] == [1]
    assert steps["needs a card"] == {"status": "not run: no GPU"}


@pytest.mark.parametrize(
    "gpu, arguments, message",
    [
        (False, [], "torch sees no GPU; --rehearse"),
        (True, ["--rehearse"], "there is a GPU: leave --rehearse out"),
        (False, ["--rehearse", "--steps", "lunch"], "invalid choice: 'lunch'"),
    ],
)
def test_wrong_arguments_of_the_day(gpu_day, gpu, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(SystemExit) as stopped:
        gpu_day.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("version, works", [("3.7.1", False), ("3.8.0", True), ("3.10.0", True)])
def test_a_triton_that_cannot_compile_for_the_card_is_unavailable(monkeypatch, version, works):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    reason = backends.unavailable("triton", "cuda")
    assert reason is None if works else f"Triton {version} cannot compile its kernels for sm_100" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backends.unavailable("triton", "cuda") is None
