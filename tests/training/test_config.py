"""Settings carry their provenance, and every wrong call is answered with what was expected and what was given."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from training import config
from training.__main__ import COMMANDS, main
from training.config import DGD_PRESETS, IMAGE_CONFIGS, CLUDIConfig, DGDConfig, DiffRCConfig, RunConfig

TINY = "--no-progress --preset short --encoder-epochs 0 --diffusion-epochs 1 --joint-epochs 0 --sample-steps 2 --k 8".split()


def refused(command, capsys):
    """What a wrong call says on stderr, as one line; tyro leaves by SystemExit and draws boxes around its words."""
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)


@pytest.fixture
def features(tmp_path):
    """A feature file of 60 rows in three classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    path = tmp_path / "features.npz"
    np.savez(path, features=rng.normal(size=(60, 5)).astype(np.float32) + 4 * labels[:, None], labels=labels)
    return path


@pytest.mark.parametrize("kind", [RunConfig, DGDConfig, CLUDIConfig, DiffRCConfig, *IMAGE_CONFIGS.values()])
def test_every_field_says_where_its_value_is_from(kind):
    for item in dataclasses.fields(kind):
        assert item.metadata["provenance"] in config.PROVENANCE, item.name


def test_what_the_paper_states_is_the_default_and_marked():
    stated = {"k": 64, "encoder_epochs": 50, "diffusion_epochs": 100, "joint_epochs": 200, "refresh_every": 20, "imbalance_ratio": 10.0}
    fields = {item.name: item for item in dataclasses.fields(DGDConfig)}
    for name, value in stated.items():
        assert fields[name].default == value and fields[name].metadata["provenance"] == "paper"


def test_resolved_settings_tell_preset_and_user_apart():
    preset = DGD_PRESETS["short"]
    settings = config.resolved(dataclasses.replace(preset, k=32), preset)
    assert settings["k"] == {"value": 32, "provenance": "user"}
    assert settings["joint_epochs"] == {"value": preset.joint_epochs, "provenance": "ours"}
    assert settings["refresh_every"]["provenance"] in ("paper", "ours")
    assert settings["beta_end"] == {"value": 0.02, "provenance": "code"}


def test_a_run_writes_settings_that_read_back(tmp_path, features):
    assert main(["dgd", *TINY, "--dataset", f"features:{features}", "--out", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["settings"]["k"] == {"value": 8, "provenance": "user"}
    settings = config.read(tmp_path / "run" / "config.json", DGDConfig)
    assert settings.k == 8 and settings.dataset == f"features:{features}"
    assert config.differences(settings, dataclasses.replace(settings, tau=0.5, device="cuda")) == ["tau: 0.95 != 0.5"]


def test_default_run_folder():
    assert str(config.run_folder(DGDConfig(seed=3), "dgd")) == "runs/dgd-digits-lt-3"
    assert str(config.run_folder(DGDConfig(dataset="features:/a/b c.npz"), "dgd")) == "runs/dgd-features-b_c-0"


WRONG_VALUES = {  # option: value -> message
    "--k 0": "config: k must be >= 1; got 0",
    "--rho-quantile 1.5": "config: rho_quantile must be < 1; got 1.5",
    "--rho -1": "config: rho must be >= 0; got -1.0",
    "--eta0 nan": "config: eta0 must be finite; got nan",
    "--guidance-scale -0.1": "config: guidance_scale must be >= 0; got -0.1",
    "--bandwidth wide": "config: bandwidth must be knn-median, scott or a number > 0; got 'wide'",
    "--bandwidth -2": "config: bandwidth must be knn-median, scott or a number > 0; got '-2'",
    "--sample-steps 1001": "config: sample_steps must be <= timesteps=1000; got 1001",
    "--beta-start 0.5": "config: beta_start must be <= beta_end=0.02; got 0.5",
    "--holdout 1": "config: holdout must be < 1; got 1.0",
    "--imbalance-ratio 0.5": "config: imbalance_ratio must be >= 1; got 0.5",
    "--tau 1": "config: tau must be < 1; got 1.0",
    "--preset tiny": "dgd: --preset must be one of default, short; got 'tiny'",
    "--dataset mnist": "dataset: expected one of digits",
    "--dataset features:/absent.npz": "no such file: /absent.npz",
    "--indices absent.npy": "indices: no such file: absent.npy",
    "--encoder mlp": "encoder: mlp does not fit images",
    "--k 707": "dgd: k must be in [1, N - 1], a latent is no neighbour of itself; got k=707 with N=707",
    "--clusters 800": "dgd: clusters must be in [1, N]; got 800 with N=707",
    "--resume": "dgd: --resume needs a run in",
    "--resume --overwrite": "dgd: give --resume or --overwrite, not both",
}


@pytest.mark.parametrize("options", WRONG_VALUES)
def test_wrong_calls_name_expectation_and_fact(tmp_path, capsys, options):
    out = tmp_path / "run"
    assert WRONG_VALUES[options] in refused(["dgd", "--no-progress", "--out", str(out), *options.split()], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    "options, expected",
    [("--learning-rate 1", "--learning-rate"), ("--latent-norm l3", "l2"), ("--k many", "k"), ("--density-at z0", "x0hat")],
)
def test_unknown_options_and_choices_are_refused(tmp_path, capsys, options, expected):
    assert expected in refused(["dgd", "--out", str(tmp_path / "run"), *options.split()], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command, expected",
    [
        (["dgdd"], f"the command must be one of {', '.join(COMMANDS)}; got 'dgdd'"),
        (["fetch", "cifar"], "fetch: expected one of inception, cifar10, cifar100, digits; got 'cifar'"),
    ],
)
def test_unknown_commands_are_refused(capsys, command, expected):
    assert expected in refused(command, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_missing_gpu_is_said(tmp_path, capsys):
    assert main(["dgd", "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "device cuda needs a GPU" in capsys.readouterr().err


def test_features_with_nan_are_refused(tmp_path, capsys, features):
    with np.load(features) as file:
        bad = file["features"].copy()
        bad[7, 2] = np.nan
        np.savez(features, features=bad, labels=file["labels"])
    assert main(["dgd", *TINY, "--dataset", f"features:{features}", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "features must be finite" in said and "1 row" in said and "7" in said


def test_a_run_is_never_overwritten_unasked(tmp_path, capsys, features):
    command = ["dgd", *TINY, "--dataset", f"features:{features}", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()

    assert main(command) == 2
    assert "already holds a finished run; give --resume, --overwrite or another --out" in capsys.readouterr().err
    assert main([*command, "--resume", "--tau", "0.5"]) == 2
    assert "has tau: 0.95 != 0.5" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    assert main([*command, "--overwrite", "--tau", "0.5"]) == 0
    stored = config.read(tmp_path / "run" / "config.json", DGDConfig)
    assert stored.tau == 0.5 and not stored.overwrite
    assert main(["dgd", "--out", str(tmp_path / "run"), "--resume"]) == 0  # of a finished run: evaluates it again


def test_overwrite_deletes_runs_only(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["dgd", "--overwrite", "--out", str(tmp_path)]) == 2
    assert "--overwrite deletes runs only" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_unknown_and_damaged_config_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="settings may hold .*; got the unknown key neighbours"):
        config.from_mapping({"neighbours": 3}, DGDConfig)
    with pytest.raises(ValueError, match="k must be int; got '64' \\(in settings\\)"):
        config.from_mapping({"k": "64"}, DGDConfig)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not the config.json of a run"):
        config.read(tmp_path / "config.json", DGDConfig)
