"""Options without torch: their names, types, defaults and help, each written once for recipes, flags and Python."""

from vsd.options.job import DrafterOptions, TargetOptions, TextOptions, TrainJob, draft_vocabulary_size
from vsd.options.online import OnlineOptions
from vsd.options.training import MeasurementOptions, ObjectiveOptions, OptimisationOptions

__all__ = [
    "DrafterOptions",
    "MeasurementOptions",
    "ObjectiveOptions",
    "OnlineOptions",
    "OptimisationOptions",
    "TargetOptions",
    "TextOptions",
    "TrainJob",
    "draft_vocabulary_size",
]
