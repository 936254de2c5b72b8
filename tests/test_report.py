"""benchmarks/report.py on a run that was made up: its tables and fits, and that it changes nothing else of the file."""

import importlib.util
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def entry(group, name, seconds, **info):
    return {"group": f"{group} cpu, 2 threads", "params": {"name": name}, "stats": {"median": seconds}, "extra_info": info}


def made_up():
    yield entry("knn_kde_grad self N=20000 d=512 k=64 float32", "ltkernels", 0.8, max_error=6e-8, peak_mb=145.0)
    yield entry("knn_kde_grad self N=20000 d=512 k=64 float32", "faiss", 3.0, max_error=1e-7, peak_mb=70.0)
    yield entry("knn_kde_grad self N=20000 d=512 k=64 float32", "product only", 2.0)
    yield entry("knn_kde_grad Q=1 N=50000 d=128 k=64 float32", "ltkernels", 0.002, max_error=1e-8, peak_mb=1.0)
    selections = ("batch B=K=128 float32 ddpm", "score_select"), ("set B=256", "posterior_mean")
    for prefix, ours in (*selections, ("pcl 128x64 float32, all pairs", "pcl_loss")):
        yield entry(prefix, ours, 0.002, error=1e-7, peak_mb=4.0)
        yield entry(prefix, "product only", 0.001)
    for n in (5000, 10000, 20000):
        yield entry(f"growth N={n} d=64 k=64 float32", "ltkernels", n**2 * 1e-9, max_error=1e-8, peak_mb=n / 2**10 + 7)
        yield entry(f"growth N={n} d=64 k=64 float32", "product only", n**2 * 2e-9)
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
    assert "| self N=20000 d=512 | 2000 | 0.40 | 1.50 | 145 | 6e-08 |" in part
    assert "| Q=1 N=50000 d=128 |  | 1 (2 ms) |  | 1.00 | 1e-08 |" in part
    assert "time grows as N^2.00 (from one size to the next 2.00, 2.00)" in part and "1024 bytes a point and 7 MB" in part
    assert all((tmp_path / "benchmarks" / name).stat().st_size > 1000 for name in ("growth.png", "arithmetic.png"))
    report.main([str(tmp_path / "run.json"), "--readme", str(readme)])
    assert readme.read_text() == text
