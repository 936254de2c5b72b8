"""benchmarks/report.py on a run that was made up: its tables and fits, and that it changes nothing else of the file."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def entry(group, name, median, **info):
    return {"group": f"{group} cpu, 2 threads", "params": {"name": name}, "stats": {"median": median}, "extra_info": info}


def made_up():
    yield entry("knn_kde_grad Q=1 N=50000 d=128 k=64 float32", "ltkernels", 0.002, max_error=1e-8, peak_mb=1.0)
    selections = ("batch B=K=128 float32 ddpm", "score_select"), ("set B=256", "posterior_mean")
    for prefix, ours in (*selections, ("pcl 128x64 float32, all pairs", "pcl_loss")):
        yield entry(prefix, ours, 0.002, error=1e-7, peak_mb=4.0)
        yield entry(prefix, "product only", 0.001)
    yield entry("few dimensions self N=100000 d=3 k=64 float32", "ltkernels", 2.0, max_error=1e-7, peak_mb=300.0)
    yield entry("few dimensions self N=100000 d=3 k=64 float32", "cKDTree", 1.0, max_error=1e-7, peak_mb=300.0)
    for d, n in itertools.product((64, 512), (5000, 10000, 20000)):
        start = "knn_kde_grad" if n == 20000 else "growth"
        yield entry(f"{start} self N={n} d={d} k=64 float32", "ltkernels", n**2 * d * 4e-12, max_error=6e-8, peak_mb=d / 64 * n / 2**10 + 7)
        yield entry(f"{start} self N={n} d={d} k=64 float32", "product only", n**2 * d * 1e-11)
    yield entry("knn_kde_grad self N=20000 d=512 k=64 float32", "faiss", 3.072, max_error=1e-7, peak_mb=70.0)
    for grad, median in ("without", 2e-5), ("with", 3e-5):
        yield entry(f"tiny B=4 D=8 {grad} grad", "knn", median)
    yield entry("import ltkernels", "import", 3.0, seconds=0.05)
    for name in ("ltkernels", "expanded, float32"):
        yield entry("arithmetic Q=1000 N=10000 d=64 k=64", name, 0.02, max_error=1e-7, peak_mb=4.0)


def test_report(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    run = {"machine_info": {"cpu": {"brand_raw": "Abacus 9"}}, "benchmarks": list(made_up())}
    (tmp_path / "run.json").write_text(json.dumps(run))
    report.main([str(tmp_path / "run.json"), "--readme", str(readme)])
    text, before = readme.read_text(), (ROOT / "README.md").read_text()
    begin, end = report.MARKS
    assert (text.split(begin)[0], text.split(end)[1]) == (before.split(begin)[0], before.split(end)[1])
    part = text.split(begin)[1].split(end)[0]
    assert "Abacus 9, 2 threads" in part
    assert "| self N=20000 d=512 | 2048 | 0.40 | 1.50 | 163 | 6e-08 |" in part
    assert "| Q=1 N=50000 d=128 |  | 1 (2.0 ms) |  | 1.00 | 1e-08 |" in part
    assert "| self N=100000 d=3 | 1 (2000 ms) | 0.50 | 300 | 1e-07 |" in part
    assert "| knn | 20 | 30 |" in part and "takes 50 ms more" in part
    assert part.count("time grows as N^2.00 (from one size to the next 2.00, 2.00)") == 2
    assert "1024 bytes a point and 7 MB;\nthe bank is 260" in part and "8192 bytes a point and 7 MB;\nthe bank is 2052" in part
    assert all((tmp_path / "benchmarks" / name).stat().st_size > 1000 for name in ("growth.png", "arithmetic.png"))
    report.main([str(tmp_path / "run.json"), "--readme", str(readme)])
    assert readme.read_text() == text
