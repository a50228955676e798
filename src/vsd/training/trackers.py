"""Trackers, which `report_to` names: one whose package is not installed is refused before anything is computed."""

from collections.abc import Iterable

from transformers.integrations import integration_utils as known

from vsd.errors import ConfigurationError

_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}  # others are named as the tracker
_REMEDY = "or leave it out (--set report_to=none: no tracker)"


def check_trackers(report_to: Iterable[str]) -> None:
    """Refuse trackers that cannot be used here.

    Raises:
        ConfigurationError: no such tracker, or its package is not installed.
    """
    names = list(report_to)
    try:
        known.get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigurationError(f"report_to: {' '.join(str(error).split())}") from error
    for name in names:
        if name == "kubeflow" and not _is_available(name):
            raise ConfigurationError(
                f"report_to: the tracker kubeflow works inside a TrainJob of Kubeflow only: run it there, {_REMEDY}"
            )
        if not _is_available(name):
            package = _PACKAGES.get(name, name)
            raise ConfigurationError(
                f"report_to: the tracker {name} needs the package {package}: pip install {package}, {_REMEDY}"
            )


def _is_available(name: str) -> bool:
    """Whether a tracker can be used; transformers lists neither Flyte nor, beside MLflow, Azure."""
    others = {"azure_ml": known.is_azureml_available, "flyte": known.is_flytekit_available}
    found: bool = others[name]() if name in others else name in known.get_available_reporting_integrations()
    return found
