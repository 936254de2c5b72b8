"""Downloads from a server of this machine: whole or absent, at the place where the code looks."""

import hashlib
import http.server
import io
import pickle
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from torchvision import datasets

from training import data, evaluate, fetch
from training.__main__ import main
from training.config import DDPMConfig

BODY = bytes(range(256)) * 64
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """(address, {path: (bytes, length that is announced)}, paths that were asked for)."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body, announced = files.get(self.path, (None, None))
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(announced or 0))
            self.end_headers()
            if body is not None:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", files, asked
        running.shutdown()


def test_a_file_arrives_whole_and_once(server, tmp_path):
    address, files, asked = server
    files["/x.pth"] = (BODY, len(BODY))
    for _ in range(2):
        path = fetch.download(f"{address}/x.pth", tmp_path / "new" / "x.pth", "sha256", SHA[:8])
        assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["x.pth"]
    assert asked == ["/x.pth"]
    path.write_bytes(BODY[:-1])  # damaged: downloaded again
    assert fetch.download(f"{address}/x.pth", path, "sha256", SHA).read_bytes() == BODY and len(asked) == 2


def test_what_goes_wrong_leaves_nothing_and_what_was_there(server, tmp_path):
    address, files, _ = server
    files["/cut"], files["/other"] = (BODY[:1000], len(BODY)), (BODY[1:], len(BODY) - 1)
    old = tmp_path / "old"
    old.write_bytes(b"damaged")
    with pytest.raises(OSError, match=f"/cut was cut off after 1000 of {len(BODY)} bytes"):
        fetch.download(f"{address}/cut", tmp_path / "x", "sha256", SHA[:8])
    with pytest.raises(ValueError, match=f"/other: expected sha256 {SHA[:8]}; got {hashlib.sha256(BODY[1:]).hexdigest()}; nothing is kept"):
        fetch.download(f"{address}/other", old, "sha256", SHA[:8])
    with pytest.raises(OSError, match="fetch: cannot download .*/none: HTTP Error 404"):
        fetch.download(f"{address}/none", tmp_path / "x", "sha256", SHA[:8])
    with pytest.raises(OSError, match="fetch: cannot download file:///nowhere"):
        fetch.download("file:///nowhere", tmp_path / "x", "sha256", SHA[:8])
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and old.read_bytes() == b"damaged"


def test_inception_goes_where_it_is_looked_for(tmp_path, monkeypatch, capsys):
    assert evaluate.INCEPTION is fetch.INCEPTION and fetch.INCEPTION_URL.endswith("/weights-inception-2015-12-05-6726825d.pth")
    (tmp_path / "upstream").write_bytes(BODY)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fetch, "INCEPTION_URL", (tmp_path / "upstream").as_uri())
    assert main(["fetch", "inception"]) == 2  # these are not Inception's weights
    assert "expected sha256 6726825d; got " in capsys.readouterr().err and not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(fetch, "INCEPTION", (f"weights-inception-{SHA[:8]}.pth",))
    assert main(["fetch", "inception"]) == 0
    path = tmp_path / "hub" / "checkpoints" / f"weights-inception-{SHA[:8]}.pth"
    assert path.read_bytes() == BODY and f"inception: {path}" in capsys.readouterr().out
    assert evaluate.inception_folder() == path.parent


def archive():
    """CIFAR-10 with two images a file, as it is released: (bytes of the archive, md5 of every file in it)."""
    out, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
            rows = {"data": np.full((2, 3072), len(name), dtype=np.uint8), "labels": [0, 1], "label_names": list("abcdefghij")}
            text = pickle.dumps(rows)
            sums[name] = hashlib.md5(text).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return out.getvalue(), sums


def test_cifar_is_downloaded_checked_and_unpacked_once(server, tmp_path, monkeypatch, capsys):
    (address, files, asked), (body, sums) = server, archive()

    class Small(datasets.CIFAR10):
        url, tgz_md5 = f"{address}/cifar-10-python.tar.gz", hashlib.md5(body).hexdigest()
        train_list = [[name, sums[name]] for name, _ in datasets.CIFAR10.train_list]
        test_list = [["test_batch", sums["test_batch"]]]
        meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}

    monkeypatch.setattr(data, "torchvision_set", lambda base: {"cifar10": Small}[base])
    files["/cifar-10-python.tar.gz"] = (body[:-9], len(body))
    assert main(["fetch", "cifar10-lt", "--root", str(tmp_path)]) == 2
    assert "was cut off" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(
        FileNotFoundError, match=f"not on this machine; on a machine with network run: ltkernels fetch cifar10 --root {tmp_path}"
    ):
        data.load("cifar10", root=tmp_path)

    files["/cifar-10-python.tar.gz"] = (body, len(body))
    for _ in range(2):
        assert main(["fetch", "cifar10-lt", "--root", str(tmp_path)]) == 0
        assert f"cifar10-lt: {tmp_path / 'cifar-10-batches-py'}" in capsys.readouterr().out
    assert len(asked) == 2 and len(data.load("cifar10", root=tmp_path)) == 10
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")  # as an unpacking that was cut short leaves it
    assert fetch.fetch("cifar10", tmp_path) and len(asked) == 2 and len(data.load("cifar10", root=tmp_path)) == 10


def test_what_needs_no_download(capsys):
    assert main(["fetch", "digits-lt", "digits-train"]) == 0
    assert capsys.readouterr().out.count("a part of scikit-learn, 1797 images: nothing to download") == 2
    with pytest.raises(ValueError, match=r"expected one of inception, cifar10, cifar100, digits; got 'tiny-imagenet' \(TinyImageNet and"):
        fetch.fetch("tiny-imagenet")


def test_a_machine_without_network_says_what_to_run(tmp_path, monkeypatch, capsys):
    command = "on a machine with network run: ltkernels fetch inception"
    with pytest.raises(FileNotFoundError, match=f"nowhere.pth: not on this machine; {command}"):
        evaluate.check_inception(DDPMConfig(inception="nowhere.pth"))
    photos = data.Dataset(
        "photos", torch.zeros(4, 3, 20, 20), None, torch.tensor([0, 0, 1, 1]), torch.arange(4), 2, (2, 2)
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=command):
        evaluate.feature_net(photos, cache=tmp_path, inception="nowhere.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(evaluate, "load_classifier", lambda *args, **options: (None, "classifier", None))
    assert evaluate.feature_net(photos, cache=tmp_path).name == "classifier"
    assert command in capsys.readouterr().err
    evaluate.feature_net(data.load("digits"), cache=tmp_path)  # for which Inception would not be taken
    assert command not in capsys.readouterr().err
