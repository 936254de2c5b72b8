"""Checkpoints are whole or absent, and a run that was stopped ends like one that was not."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from training import checkpoint, loop
from training.__main__ import main
from training.loop import Interrupted, Stage, train
from training.methods import dgd


class Regression(Stage):
    """A stage that depends on everything a checkpoint has to carry: Adam's moments, a cache that grows stale, the step's noise."""

    name = "regression"

    def __init__(self, steps=10, stop_at=None):
        torch.manual_seed(0)
        self.modules, self.steps, self.lr, self.cache = {"net": nn.Linear(3, 2)}, steps, {"net": 0.1}, {}
        self.stop_at = stop_at

    def loss(self, step, rng):
        if step % 4 == 0:
            self.cache["target"] = torch.randn(8, 2, generator=rng) + self.modules["net"].bias.detach()
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        x = torch.randn(8, 3, generator=rng)
        loss = (self.modules["net"](x) - self.cache["target"]).square().mean()
        return loss, {"twice": 2 * loss}


def finish(folder, stage):
    train(stage, folder, seed=7, checkpoint_every=3, progress=False)
    return stage.modules["net"].state_dict(), loop.read_log(folder / "log.jsonl")


def test_ten_steps_are_five_an_interrupt_and_five_more(tmp_path):
    whole, whole_log = finish(tmp_path / "whole", Regression())
    with pytest.raises(Interrupted, match="stage regression after step 5") as stop:
        finish(tmp_path / "cut", Regression(stop_at=4))
    assert stop.value.signum == signal.SIGINT
    assert checkpoint.latest(tmp_path / "cut", "regression") == 5
    cut, cut_log = finish(tmp_path / "cut", Regression())
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert whole_log == cut_log and len(cut_log) == 10


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_losses(tmp_path):
    class Killed(RuntimeError):
        pass

    class Dies(Regression):
        def loss(self, step, rng):
            if step == 8:
                raise Killed
            return super().loss(step, rng)

    whole, whole_log = finish(tmp_path / "whole", Regression())
    with pytest.raises(Killed):
        finish(tmp_path / "cut", Dies())
    assert checkpoint.latest(tmp_path / "cut", "regression") == 6
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"stage": "regression", "step": 6, "loss": 1.0}\n{"stage": "regr')  # what a kill may leave
    cut, cut_log = finish(tmp_path / "cut", Regression())
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert whole_log == cut_log


def test_a_finished_stage_is_not_run_again(tmp_path):
    first, _ = finish(tmp_path, Regression())

    class Never(Regression):
        def loss(self, step, rng):
            raise AssertionError

    again, _ = finish(tmp_path, Never())
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_signals_are_ours_only_while_training(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    finish(tmp_path, Regression())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_only_the_newest_checkpoint_stays_and_temporary_files_do_not(tmp_path):
    finish(tmp_path, Regression())
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["regression-000010.pt", "regression-000010.safetensors"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    checkpoint.write_json(path, {"acc": 1.0})
    with pytest.raises(ValueError):
        checkpoint.write_json(path, {"acc": float("nan")})  # NaN is no JSON
    assert json.loads(path.read_text()) == {"acc": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_weights_without_their_pt_are_no_checkpoint(tmp_path):
    finish(tmp_path, Regression())
    (tmp_path / "weights" / "regression-000099.safetensors").write_bytes(b"cut short")
    assert checkpoint.latest(tmp_path, "regression") == 10


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, suffix):
    finish(tmp_path, Regression())
    path = tmp_path / "weights" / f"regression-000010{suffix}"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"checkpoint: cannot read .*regression-000010\{suffix}"):
        finish(tmp_path, Regression())


def test_weights_of_another_network_are_refused(tmp_path):
    finish(tmp_path, Regression())
    other = {"net": nn.Linear(4, 2)}
    with pytest.raises(ValueError, match="does not fit net"):
        checkpoint.load_modules(tmp_path / "weights" / "regression-000010.safetensors", other)
    with pytest.raises(FileNotFoundError, match="checkpoint: no such file"):
        checkpoint.load_modules(tmp_path / "weights" / "absent.safetensors", other)


def test_a_loss_that_is_not_finite_stops_the_run_before_its_checkpoint(tmp_path):
    class Explodes(Regression):
        def loss(self, step, rng):
            loss, figures = super().loss(step, rng)
            return (loss / 0 if step == 4 else loss), figures

    with pytest.raises(FloatingPointError, match="stage regression is inf in step 4"):
        finish(tmp_path, Explodes())
    assert checkpoint.latest(tmp_path, "regression") == 3


def test_generators_are_functions_of_their_key():
    draw = lambda *key: torch.rand(4, generator=loop.generator(*key))  # noqa: E731
    assert torch.equal(draw(0, 0, "joint", 3), draw(0, 0, "joint", 3))
    others = [draw(1, 0, "joint", 3), draw(0, 1, "joint", 3), draw(0, 0, "diffusion", 3), draw(0, 0, "joint", 4)]
    assert all(not torch.equal(draw(0, 0, "joint", 3), other) for other in others)


def test_every_epoch_visits_every_row_once():
    parts = loop.batches_per_epoch(707, 128)
    epoch = [loop.batch_rows(707, 128, step, seed=0, stage="joint") for step in range(parts)]
    assert parts == 6 and max(map(len, epoch)) <= 128 and min(map(len, epoch)) >= 117
    assert torch.equal(torch.cat(epoch).sort().values, torch.arange(707))
    assert not torch.equal(epoch[0], loop.batch_rows(707, 128, parts, seed=0, stage="joint"))


TINY = (
    "--preset short --batch-size 25 --encoder-epochs 2 --diffusion-epochs 2 --joint-epochs 2 "
    "--gen-every 5 --gen-per-refresh 64 --sample-steps 3 --k 16"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on 150 digits that nothing disturbs, and the command that made it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.json").write_text(json.dumps(list(range(150))))
    command = ["dgd", "--no-progress", *TINY.split(), "--dataset", "digits", "--indices", str(folder / "rows.json"), "--out"]
    assert main([*command, str(folder / "whole")]) == 0
    return folder / "whole", command


@pytest.mark.parametrize("stage, step", [("Pretrain", 3), ("LatentDiffusion", 11), ("Joint", 7)])
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, capsys, stage, step):
    (whole, command), cut = whole, tmp_path / "cut"
    original = getattr(dgd, stage).loss

    def interrupted(self, at, rng):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, at, rng)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(dgd, stage), "loss", interrupted)
        assert main([*command, str(cut)]) == 130
    assert f"after step {step + 1}" in (message := capsys.readouterr().err) and f"--out {cut} --resume" in message
    assert not (cut / "metrics.json").exists()

    assert main(["dgd", "--no-progress", "--out", str(cut), "--resume"]) == 0  # the settings come from the run
    for path in sorted((whole / "weights").glob("*.safetensors")):
        assert (cut / "weights" / path.name).read_bytes() == path.read_bytes(), path.name
    reports = [{**json.loads((run / "metrics.json").read_text()), "seconds": 0} for run in (whole, cut)]
    assert reports[0] == reports[1]
    assert loop.read_log(whole / "log.jsonl") == loop.read_log(cut / "log.jsonl")
