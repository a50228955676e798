"""Pictures that the project renders itself, with what is true of them in words."""

from vsd.pictures.scenes import SIDE, Question, Scene, Thing, caption, questions, render, scene

__all__ = ["SIDE", "Question", "Scene", "Thing", "caption", "questions", "render", "scene"]
