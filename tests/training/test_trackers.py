"""Trackers: one that cannot be used is one line at the start, which names the package and the remedy."""

from pathlib import Path

import pytest
from transformers.integrations import integration_utils as trackers

from vsd import cli
from vsd.errors import ConfigurationError
from vsd.training import VSDConfig

PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit", "kubeflow": "Kubeflow"}


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without any tracker."""
    for name in [name for name in vars(trackers) if name.startswith("is_") and name.endswith("_available")]:
        monkeypatch.setattr(trackers, name, lambda: False)


@pytest.mark.parametrize("tracker", sorted(trackers.INTEGRATION_TO_CALLBACK))
def test_a_tracker_without_its_package_is_named_with_the_remedy(tmp_path: Path, tracker: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the tracker {tracker} .*report_to=none") as caught:
        VSDConfig(output_dir=str(tmp_path), report_to=tracker)
    assert "\n" not in str(caught.value) and PACKAGES.get(tracker, f"pip install {tracker}") in str(caught.value)


@pytest.mark.parametrize("given", ["none", ["none"], "all", []])
def test_no_tracker_needs_no_package(tmp_path: Path, given: str | list[str]) -> None:
    assert VSDConfig(output_dir=str(tmp_path), report_to=given).report_to == []


def test_an_installed_tracker_does_not_excuse_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "is_tensorboard_available", lambda: True)
    assert VSDConfig(output_dir=str(tmp_path)).report_to == ["tensorboard"]
    with pytest.raises(ConfigurationError, match="the tracker wandb needs"):
        VSDConfig(output_dir=str(tmp_path), report_to=["tensorboard", "wandb"])
    with pytest.raises(ConfigurationError, match="nobody is not supported"):
        VSDConfig(output_dir=str(tmp_path), report_to=["nobody"])


def test_the_command_refuses_it_before_it_reads_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "nowhere.jsonl", "--target", "./nowhere", "--output-dir", str(tmp_path / "run")]
    assert cli.main([*words, "--set", "report_to=wandb"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install wandb" in error and not (tmp_path / "run").exists()
