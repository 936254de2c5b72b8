"""At one global batch the number of ranks changes nothing: the same images are chosen, and losses agree to rounding."""

import json
import multiprocessing
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist

from training import data, loop, ranks, run_images
from training.__main__ import main
from training.config import IMAGE_CONFIGS
from training.loop import Interrupted

STEPS, BATCH = 4, 32


@pytest.fixture(scope="module")
def spawn():
    """spawn(function, size, *arguments): function(*arguments) on `size` ranks of gloo. Their processes are forked from one that has only
    imported: a fork of this one could not run autograd, and a fresh interpreter each would import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.run_images", "training.__main__", "sklearn.datasets", "torch._dynamo", "tyro", "pytest"])

    def start(function, size, folder, *arguments):
        folder.mkdir()
        queue = context.SimpleQueue()
        members = [context.Process(target=_member, args=(queue, function, rank, size, folder, *arguments)) for rank in range(size)]
        for member in members:
            member.start()
        answers = dict(queue.get() for _ in members)
        for member in members:
            member.join()
        failed = [answer for _, answer in answers.values() if answer]
        assert not failed, failed[0]
        return [answers[rank][0] for rank in range(size)]

    return start


def _member(queue, function, rank, size, folder, *arguments):
    torch.set_num_threads(1)
    try:
        if function is not command:  # which lets the program find the others by itself
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
        queue.put((rank, (function(rank, size, folder, *arguments), None)))
    except BaseException:
        queue.put((rank, (None, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def trained(rank, size, folder, method, options):
    """(log of a short training, indices chosen by this rank, its rows, its words)."""
    settings = IMAGE_CONFIGS[method](batch_size=BATCH, steps=STEPS, width=32, **options)
    dataset = data.load("digits-lt", imbalance_ratio=20)
    modules = run_images.build_modules(settings, (1, 8, 8), 10)
    stage = run_images.STAGES[method](dataset, modules, settings)
    chosen, rows = [], []
    if method == "t2h":
        transfer, target = type(stage.method).transfer, stage.target

        def noted(self, *arguments, **named):
            chosen.append((out := transfer(self, *arguments, **named)).index)
            return out

        type(stage.method).transfer = noted
        stage.target = lambda batch: rows.append(batch.rows) or target(batch)
    try:
        loop.train(stage, folder, seed=0, progress=False)
    finally:
        if method == "t2h":
            type(stage.method).transfer = transfer
    log = loop.read_log(folder / "log.jsonl") if rank == 0 else []
    weights = modules["ema"].state_dict()
    as_lists = lambda tensors: [tensor.tolist() for tensor in tensors]  # noqa: E731
    return log, as_lists(chosen), as_lists(rows), {**stage.notes(), **stage.report()}, {k: v.tolist() for k, v in weights.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same trainings in this one process."""

    def make(method, **options):
        return trained(0, 1, tmp_path_factory.mktemp("alone"), method, options)

    return make


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_ranks_choose_as_one_process_does(spawn, alone, tmp_path, size):
    options = {"reference": "gather", "cfg_drop": 0.3, "uncond_transfer_mode": "full"}
    one_log, one_chosen, one_rows, one_said, one_weights = alone("t2h", **options)
    answers = spawn(trained, size, tmp_path / "ranks", "t2h", options)
    for step in range(STEPS):
        for part, whole in ((1, one_chosen), (2, one_rows)):
            assert [index for answer in answers for index in answer[part][step]] == whole[step]
    assert any(index != row for step in one_chosen for row, index in enumerate(step))  # something was there to be chosen
    log = answers[0][0]
    assert len(log) == STEPS
    for mine, theirs in zip(one_log, log, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6) and mine["moved"] == pytest.approx(theirs["moved"], abs=1e-6)
    for answer in answers:
        assert answer[3]["transfer"] == one_said["transfer"] and answer[3]["reference_batch"] == one_said["reference_batch"]
        assert answer[4] == answers[0][4]  # every rank has the same weights, bit by bit
        for key, value in one_weights.items():
            torch.testing.assert_close(torch.tensor(answer[4][key]), torch.tensor(value), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method, options", [
    ("ddpm", {"augment": "diffaug", "loss_weight": "inverse"}), ("cbdm", {"cfg_drop": 0.5, "augment": "ada", "batch_resample": "sqrt"}),
    ("diffrop", {"pcl_group_size": 12, "cfg_drop": 0.3}), ("ccua", {"cfg_drop": 0.3}),
])  # fmt: skip
def test_losses_do_not_depend_on_ranks(spawn, alone, tmp_path, method, options):
    one, two = alone(method, **options)[0], spawn(trained, 2, tmp_path / "ranks", method, options)[0][0]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)


def gradients(rank, size, folder, options):
    """(figures, gradients) of one step of diffrop, as the loop averages them."""
    options = {"batch_size": BATCH, "steps": STEPS, "width": 32, "cfg_drop": 0.2, "pcl_ratio_every": 1, **options}
    settings, dataset = IMAGE_CONFIGS["diffrop"](**options), data.load("digits-lt", imbalance_ratio=20)
    stage = run_images.STAGES["diffrop"](dataset, run_images.build_modules(settings, (1, 8, 8), 10), settings)
    loss, figures = stage.loss(0, loop.generator(0, 0, "denoise", 0))
    loss.backward()
    params = list(stage.modules["net"].parameters())
    figures = {name: value.detach() for name, value in {"loss": loss, **figures}.items()}
    figures = loop.averaged(params, figures) if size > 1 else figures
    return {name: float(value) for name, value in figures.items()}, [param.grad.tolist() for param in params]


DIFFROP = [  # groups of 12 and of 5 straddle ranks
    (2, {"pcl_group_size": 12}), (4, {"pcl_group_size": 5, "base": "cbdm", "pcl_form": "reciprocal"}), (4, {"pcl_t": "batch"}),
    (2, {"pcl_group_size": 12, "pcl_stopgrad": "partner", "pcl_reduce": "sum", "pcl_tau0": 0.1}), (2, {"pcl_noise": "shared"}),
    (2, {"pcl_group_size": 12, "pcl_distance": "kl", "pcl_form": "hinge", "pcl_margin": 1e4, "pcl_tau0": 1e-3}),
    (2, {"batch_size": 8, "pcl_t": "reforward"}), (2, {"batch_size": 8, "pcl_t": "reforward", "pcl_noise": "shared", "augment": "ada"}),
]  # fmt: skip


@pytest.mark.parametrize("size, options", DIFFROP)
def test_pairs_of_rows_of_two_ranks_count_as_in_one_process(spawn, tmp_path, size, options):
    (one, one_gradients), answers = gradients(0, 1, tmp_path, options), spawn(gradients, size, tmp_path / "ranks", options)
    assert one["pairs"] > 10 and one["loss_pcl"] > 0
    for figures, found in answers:
        assert figures.pop("pcl_ratio") == pytest.approx(one["pcl_ratio"], rel=1e-4)  # of sums over thousands of gradients
        assert figures == pytest.approx({name: one[name] for name in figures}, rel=1e-6) and len(figures) == len(one) - 1
        for mine, theirs in zip(one_gradients, found, strict=True):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-4, atol=1e-6 * (1 + one["loss"]))


def test_without_gather_the_log_says_what_the_reference_is(spawn, alone, tmp_path):
    said = spawn(trained, 2, tmp_path / "ranks", "t2h", {})[0][3]["reference_batch"]
    assert said == "each rank's own 16 images of a batch of 32 on 2 ranks; --reference gather takes all of them"
    assert alone("t2h")[3]["reference_batch"] == "the batch, 32 images"
    assert alone("t2h", reference="bank")[3]["reference_batch"] == "the whole data set, 587 images"


def stopped(rank, size, folder):
    """A signal for one rank stops all of them, after the same step."""
    settings = IMAGE_CONFIGS["ddpm"](batch_size=BATCH, steps=STEPS, width=32)
    stage = run_images.STAGES["ddpm"](data.load("digits-lt"), run_images.build_modules(settings, (1, 8, 8), 10), settings)
    after = stage.after_step
    stage.after_step = lambda step: os.kill(os.getpid(), 15) if (rank, step) == (1, 1) else after(step)
    try:
        loop.train(stage, folder, seed=0, progress=False)
    except Interrupted as stop:
        return stop.signum, sorted(path.name for path in (folder / "weights").iterdir())


def test_a_signal_for_one_rank_stops_all(spawn, tmp_path):
    answers = spawn(stopped, 2, tmp_path / "ranks")
    assert answers == [(15, ["denoise-000002.pt", "denoise-000002.safetensors"])] * 2


def sums(rank, size, folder):
    values = [torch.full((2, 3), float(rank)), torch.tensor(float(rank))]
    ranks.average(values)
    return [value.mean().item() for value in values], ranks.total(torch.tensor([rank, 1])).tolist(), ranks.part(6).start


def test_means_and_sums(spawn, tmp_path):
    assert spawn(sums, 2, tmp_path / "ranks") == [([0.5, 0.5], [1, 2], 0), ([0.5, 0.5], [1, 2], 3)]


def refused(rank, size, folder):
    try:
        ranks.on_the_first(lambda: 1 / (1 - size // 2))
    except BaseException as error:
        return type(error).__name__


def test_what_fails_on_the_first_rank_ends_all(spawn, tmp_path):
    assert spawn(refused, 2, tmp_path / "ranks") == ["ZeroDivisionError", "SystemExit"]


def command(rank, size, folder, port, options):
    """What torchrun starts."""
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return main(["t2h", "--no-progress", "--out", str(folder / "run"), *options])


def test_the_command_under_torchrun_writes_one_run(spawn, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = "--no-evaluate --steps 3 --batch-size 8 --width 16 --samples 10 --sample-steps 2".split()
    assert spawn(command, 2, tmp_path / "ranks", port, options) == [0, 0]
    report = json.loads((tmp_path / "ranks" / "run" / "metrics.json").read_text())
    assert report["reference_batch"].startswith("each rank's own 4 images") and sum(report["transfer"]["rows"]) == 3 * 8
    assert len(loop.read_log(tmp_path / "ranks" / "run" / "log.jsonl")) == 3


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    assert main(["ddpm", "--no-progress", "--batch-size", "32", "--out", str(tmp_path / "run")]) == 2
    assert "ddpm: batch_size must be a multiple of the 3 ranks; got 32" in capsys.readouterr().err
