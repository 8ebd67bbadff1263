"""Digit scenes: a small visual question answering task made of real handwriting.

A scene is a cluttered, muted picture with two to six handwritten digits on it. Inside one scene no two digits share a
value or a colour, no two overlap, and one is clearly the largest. So every question has exactly one right answer:

====================  ==========================================  ===========
kind                  question                                    answer
====================  ==========================================  ===========
``colour_of_digit``   what colour is the 7 ?                      a colour
``digit_of_colour``   which digit is red ?                        0 ... 9
``count``             how many digits are there ?                 2 ... 6
``existence``         is there a 7 ?                              yes / no
``relation``          is the red digit above the blue digit ?     yes / no
``largest``           which digit is the largest ?                0 ... 9
====================  ==========================================  ===========

Why this task suits visual token pruning: the digits cover about a fifth of the picture, everything else is clutter
that no question asks about, and most questions are about one or two of the digits. A model that drops the right
patches loses nothing, and a model that drops the wrong ones cannot guess, since no answer is given more than about one
time in five.

Everything is decided by ``(split, seed, index, image_size)``: a scene can be drawn again alone, and the first hundred
scenes of a larger set are the smaller set.

>>> import numpy as np
>>> questions = ask_questions(draw_scene("train", index=0), np.random.default_rng(0))
>>> [question.kind for question in questions] == list(QUESTION_KINDS)
True
"""

from ..splits import SPLITS
from .dataset import load_digit_questions, load_digit_scenes
from .drawing import draw_scene
from .handwriting import digit_instances
from .questions import QUESTION_KINDS, TRAINING_KINDS, VOCABULARY, Question, ask_questions, caption
from .scene import (
    BACKGROUND_COLOUR,
    BACKGROUND_DIGIT,
    COLOUR_VALUES,
    COLOURS,
    Scene,
    SceneObject,
    patch_labels,
)

__all__ = [
    "BACKGROUND_COLOUR",
    "BACKGROUND_DIGIT",
    "COLOURS",
    "COLOUR_VALUES",
    "QUESTION_KINDS",
    "SPLITS",
    "TRAINING_KINDS",
    "VOCABULARY",
    "Question",
    "Scene",
    "SceneObject",
    "ask_questions",
    "caption",
    "digit_instances",
    "draw_scene",
    "load_digit_questions",
    "load_digit_scenes",
    "patch_labels",
]
